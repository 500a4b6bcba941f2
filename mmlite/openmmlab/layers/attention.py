"""Deformable attention modules with mmcv's call signature, around those of :mod:`mmlite.nn`."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from torch import Tensor

from ... import nn
from .shapes import level_sizes


class _MmcvCall:
    """mmcv's way of calling a deformable attention."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | Sequence[tuple[int, int]] | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend to sampled points.

        Args:
            query (Tensor): shape (bs, num_queries, embed_dims), or (num_queries, bs, embed_dims)
                where ``batch_first`` is False; so for ``value``, ``identity``, ``query_pos``.
            key (Tensor, optional): Not used: keys, where there are any, come from ``value``.
            value (Tensor, optional): shape (bs, num_value, embed_dims). Defaults to ``query``.
            identity (Tensor, optional): Added to the output. Defaults to ``query``.
            query_pos (Tensor, optional): Added to ``query``.
            key_padding_mask (Tensor, optional): bool, True on padding, shape (bs, num_value).
            reference_points (Tensor): Normalised (x, y) or (cx, cy, w, h), shape
                (bs, num_queries, num_levels, 2 or 4).
            spatial_shapes (Tensor | Sequence[tuple[int, int]]): (h, w) of each level, integer,
                shape (num_levels, 2).
            level_start_index (Tensor, optional): Not used: it follows from ``spatial_shapes``.

        Returns:
            Tensor: The shape of ``query``.

        Raises:
            ValueError: Shapes do not fit each other.
        """
        tensors = [query, value, identity, query_pos]
        if not self.batch_first:
            tensors = [None if tensor is None else tensor.transpose(0, 1) for tensor in tensors]
        output = super().forward(
            *tensors,
            key_padding_mask,
            reference_points=reference_points,
            spatial_shapes=level_sizes(spatial_shapes),
        )
        return output if self.batch_first else output.transpose(0, 1)


@MODELS.register_module()
class FusedDeformableAttention(_MmcvCall, nn.DeformableAttention, MultiScaleDeformableAttention):
    """mmcv's ``MultiScaleDeformableAttention``, computed by :func:`mmlite.ops.ms_deform_attn`.

    Same arguments, parameters and numbers.
    """

    __init__ = MultiScaleDeformableAttention.__init__
    init_weights = MultiScaleDeformableAttention.init_weights


@MODELS.register_module()
class KeyAwareDeformableAttention(
    _MmcvCall, nn.KeyAwareDeformableAttention, MultiScaleDeformableAttention
):
    """:class:`mmlite.nn.KeyAwareDeformableAttention` (KDA; Lite DETR, section 4.3) for MMDetection.

    It is a ``MultiScaleDeformableAttention``, which matters: MMDetection's detectors re-initialise
    every matrix of the encoder and restore the offsets' directional grid only in instances of
    that class.

    Args:
        embed_dims (int): Channels of query and value, a multiple of ``num_heads``.
        num_heads (int): Attention heads.
        num_levels (int): Feature levels.
        num_points (int): Sampling points per head and level.
        im2col_step (int): Kept for mmcv's configs; not used.
        dropout (float): Dropout on the output, before the identity is added.
        batch_first (bool): Whether the batch is the first dimension.
        norm_cfg (dict, optional): Kept for mmcv's configs; not used.
        init_cfg (dict, optional): Initialisation config of mmengine.
        proj_key (bool): Project keys by a layer of their own. Off, as in the published models,
            the sampled value is its own key, and every point is sampled once.
        same_loc (bool): Predict one set of offsets per head and point, in pixels, and use it on
            every level.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: ConfigDict | dict | None = None,
        proj_key: bool = False,
        same_loc: bool = False,
    ) -> None:
        # Not mmcv's constructor, which builds layers that this attention has not.
        BaseModule.__init__(self, init_cfg)
        nn.KeyAwareDeformableAttention.__init__(
            self, embed_dims, num_heads, num_levels, num_points, dropout, proj_key, same_loc
        )
        self.im2col_step = im2col_step
        self.batch_first = batch_first
        self.norm_cfg = norm_cfg
