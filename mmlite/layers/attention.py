"""Deformable attention modules that run through :mod:`mmlite.ops`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import xavier_init
from torch import Tensor, nn

from .. import ops


@MODELS.register_module()
class FusedDeformableAttention(MultiScaleDeformableAttention):
    """mmcv's ``MultiScaleDeformableAttention``, computed by :func:`mmlite.ops.ms_deform_attn`.

    Same arguments, parameters and numbers.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
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
            spatial_shapes (Tensor): (h, w) of each level, integer, shape (num_levels, 2).
            level_start_index (Tensor, optional): Not used: it follows from ``spatial_shapes``.

        Returns:
            Tensor: The shape of ``query``.

        Raises:
            ValueError: Shapes do not fit each other.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        output = self._attend(query, value, key_padding_mask, reference_points, spatial_shapes)
        output = self.output_proj(output)
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity

    def _attend(
        self,
        query: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Tensor,
    ) -> Tensor:
        offsets, weights = self._project_query(query, self.sampling_offsets, self.attention_weights)
        weights = weights.unflatten(-1, (self.num_heads, self.num_levels * self.num_points))
        weights = weights.softmax(-1)
        return ops.ms_deform_attn(
            self._project_value(value, self.value_proj, key_padding_mask),
            spatial_shapes,
            self.sampling_locations(offsets, reference_points, spatial_shapes),
            weights.unflatten(-1, (self.num_levels, self.num_points)),
        )

    @staticmethod
    def _project_query(query: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Apply several linear layers to the query, in one matrix product without gradients.

        With gradients each has a product of its own: what backward keeps of one would otherwise
        keep the memory of all.
        """
        if torch.is_grad_enabled():
            return tuple(layer(query) for layer in layers)
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        return F.linear(query, weight, bias).split([layer.out_features for layer in layers], -1)

    def _project_value(
        self, value: Tensor, projection: nn.Linear, key_padding_mask: Tensor | None
    ) -> Tensor:
        """Project to heads, (bs, num_value, num_heads, head_dim), zero at padded positions."""
        projected = projection(value)
        if key_padding_mask is not None:
            projected.masked_fill_(key_padding_mask[..., None], 0.0)
        return projected.unflatten(-1, (self.num_heads, -1))

    def sampling_locations(
        self, offsets: Tensor, reference_points: Tensor, spatial_shapes: Tensor
    ) -> Tensor:
        """Offsets around the reference points (Deformable DETR, section 4.1 and appendix A.4).

        Args:
            offsets (Tensor): shape (bs, num_queries, num_heads * num_levels * num_points * 2),
                in pixels of each level; or without num_levels: one set for every level.
            reference_points (Tensor): shape (bs, num_queries, num_levels, 2 or 4).
            spatial_shapes (Tensor): shape (num_levels, 2).

        Returns:
            Tensor: Normalised, dtype of ``reference_points``, shape
            (bs, num_queries, num_heads, num_levels, num_points, 2).
        """
        levels, points = self.num_levels, self.num_points
        if reference_points.shape[-2] != levels:
            raise ValueError(
                f'reference_points is for {reference_points.shape[-2]} feature levels, '
                f'but the attention has num_levels={levels}'
            )
        if reference_points.shape[-1] == 2:
            unit = spatial_shapes.flip(-1).to(reference_points).reciprocal()  # (L, 2)
        elif reference_points.shape[-1] == 4:
            unit = reference_points[..., 2:] * (0.5 / points)  # (bs, num_queries, L, 2)
        else:
            raise ValueError(
                'the last dimension of reference_points must be 2 (x, y) or 4 (cx, cy, w, h); '
                f'got {reference_points.shape[-1]}'
            )
        offsets = offsets.to(reference_points.dtype)
        offsets = offsets.unflatten(-1, (self.num_heads, -1))
        if offsets.shape[-1] != levels * points * 2:
            offsets = offsets.repeat(*(1,) * (offsets.dim() - 1), levels)
        # The last three dimensions are kept flat here: elementwise products over a trailing
        # dimension of 2 are several times slower on the CPU.
        centre = _repeat_points(reference_points[..., :2], points).unsqueeze(-2)
        unit = _repeat_points(unit, points)
        unit = unit if unit.dim() == 1 else unit.unsqueeze(-2)
        return torch.addcmul(centre, offsets, unit).unflatten(-1, (levels, points, 2))


def _repeat_points(per_level: Tensor, points: int) -> Tensor:
    """(..., L, 2) -> (..., L * points * 2)."""
    return per_level.unsqueeze(-2).expand(*per_level.shape[:-1], points, 2).flatten(-3)


@MODELS.register_module()
class KeyAwareDeformableAttention(FusedDeformableAttention):
    r"""Key-aware deformable attention, KDA (Lite DETR, section 4.3).

    The offsets are predicted from the query as in standard deformable attention. Keys and values
    are sampled at the same points, and the points are weighted by
    :math:`\mathrm{softmax}(q k^T / \sqrt{d})` with q the projected query, instead of by weights
    predicted from the query alone. There is no ``attention_weights`` layer.

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
        super().__init__(
            embed_dims=embed_dims,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            im2col_step=im2col_step,
            dropout=dropout,
            batch_first=batch_first,
            norm_cfg=norm_cfg,
            init_cfg=init_cfg,
        )
        self.proj_key = proj_key
        self.same_loc = same_loc
        self.attention_weights = None
        if same_loc:
            self.sampling_offsets = nn.Linear(embed_dims, num_heads * num_points * 2)
        self.query_proj = nn.Linear(embed_dims, embed_dims)
        self.key_proj = nn.Linear(embed_dims, embed_dims) if proj_key else None
        self.init_weights()

    def init_weights(self) -> None:
        """Directional grid as offset bias, Xavier projections, zero biases."""
        super().init_weights()
        if self.attention_weights is not None:
            return  # called by mmcv's constructor, before the layers of this class exist
        if self.same_loc:
            # mmcv has filled in the grid of every level; they are all alike.
            grid = self.sampling_offsets.bias.data.view(self.num_heads, self.num_levels, -1)
            self.sampling_offsets.bias.data = grid[:, 0].reshape(-1)
        xavier_init(self.query_proj, distribution='uniform', bias=0.0)
        if self.proj_key:
            xavier_init(self.key_proj, distribution='uniform', bias=0.0)

    def _attend(
        self,
        query: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Tensor,
    ) -> Tensor:
        offsets, query = self._project_query(query, self.sampling_offsets, self.query_proj)
        projected_value = self._project_value(value, self.value_proj, key_padding_mask)
        key = projected_value
        if self.proj_key:
            key = self._project_value(value, self.key_proj, key_padding_mask)
        return ops.key_aware_deform_attn(
            query.unflatten(-1, (self.num_heads, -1)),
            key,
            projected_value,
            spatial_shapes,
            self.sampling_locations(offsets, reference_points, spatial_shapes),
        )
