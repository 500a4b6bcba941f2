"""The interleaved encoder in the place of MMDetection's."""

from __future__ import annotations

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from torch import Tensor

from ... import nn
from ...nn.encoder import BeforeLayer
from .attention import FusedDeformableAttention, KeyAwareDeformableAttention
from .shapes import level_sizes


@MODELS.register_module()
class LiteEncoderLayer(nn.LiteEncoderLayer, BaseModule):
    """:class:`mmlite.nn.LiteEncoderLayer` made of what MMDetection's configs describe.

    Args:
        step (EncoderStep): Which tokens the layer updates.
        self_attn_cfg (dict): Arguments of the attention.
        ffn_cfg (dict): Arguments of mmcv's ``FFN``.
        norm_cfg (dict): Config of the norms.
        key_aware (bool): Key-aware deformable attention, or standard.
        small_ffn (bool): Whether low-level tokens have the small FFN.
        init_cfg (dict, optional): Initialisation config of mmengine.
        chunk_size (int, optional): See :class:`mmlite.nn.LiteEncoder`.
    """

    def __init__(
        self,
        step: nn.EncoderStep,
        self_attn_cfg: ConfigDict | dict | None = None,
        ffn_cfg: ConfigDict | dict | None = None,
        norm_cfg: ConfigDict | dict | None = None,
        key_aware: bool = True,
        small_ffn: bool = True,
        init_cfg: ConfigDict | dict | None = None,
        chunk_size: int | None = 1024,
    ) -> None:
        BaseModule.__init__(self, init_cfg)
        attention = KeyAwareDeformableAttention if key_aware else FusedDeformableAttention
        self_attn = attention(**{**(self_attn_cfg or {}), 'batch_first': True})
        ffn_cfg = dict(ffn_cfg or {})

        def make_ffn(channels: int | None) -> FFN:
            hidden = {} if channels is None else {'feedforward_channels': channels}
            return FFN(**{**ffn_cfg, **hidden})

        nn.LiteEncoderLayer.__init__(
            self,
            step,
            self_attn,
            make_ffn,
            lambda: build_norm_layer(norm_cfg or {'type': 'LN'}, self_attn.embed_dims)[1],
            small_ffn,
            chunk_size,
        )


@MODELS.register_module()
class LiteEncoder(nn.LiteEncoder, BaseModule):
    """Interleaved multi-scale encoder (Lite DETR, section 4) for MMDetection's detectors.

    Takes the place of MMDetection's ``DeformableDetrTransformerEncoder``: same call, same output.
    :class:`mmlite.nn.LiteEncoder` does the work and has the same parameters by the same names.

    Args:
        schedule (str | EncoderSchedule): For example ``'H3L1-(2+1)x3'``.
        num_layers (int, optional): Layers of the stock encoder that this one replaces; must be
            A * B of the schedule. It is there because stock configs have it.
        layer_cfg (dict): ``self_attn_cfg``, ``ffn_cfg`` and ``norm_cfg`` of the stock layer;
            ``self_attn_cfg`` may hold ``proj_key`` and ``same_loc`` where ``key_aware`` is on.
        key_aware (bool): Key-aware deformable attention (KDA), or standard.
        small_ffn (bool): Give low-level tokens an FFN of ``embed_dims`` hidden channels.
        update (str): ``'joint'`` or ``'sequential'``; see :meth:`EncoderSchedule.steps`.
        num_cp (int): Layers, counted from the first, whose activations are recomputed in the
            backward pass (torch's checkpointing). -1 for none.
        init_cfg (dict, optional): Initialisation config of mmengine.
        low_levels (Sequence[int], optional): Indices of the low-level maps among the levels. By
            default the largest maps, as many as the schedule says.
        chunk_size (int, optional): See :class:`mmlite.nn.LiteEncoder`.

    Raises:
        ValueError: The schedule is malformed, or does not fit ``num_layers`` or the number of
            levels of the attention; the message says what would fit.
    """

    def __init__(
        self,
        schedule: str | nn.EncoderSchedule,
        num_layers: int | None = None,
        layer_cfg: ConfigDict | dict | None = None,
        key_aware: bool = True,
        small_ffn: bool = True,
        update: str = 'joint',
        num_cp: int = -1,
        init_cfg: ConfigDict | dict | None = None,
        low_levels: tuple[int, ...] | None = None,
        chunk_size: int | None = 1024,
    ) -> None:
        BaseModule.__init__(self, init_cfg)
        schedule = nn.EncoderSchedule.parse(schedule)
        layer_cfg = dict(layer_cfg or {})
        num_levels = (layer_cfg.get('self_attn_cfg') or {}).get('num_levels', 4)
        schedule.check_fit(num_layers, num_levels, update)

        def make_layer(step: nn.EncoderStep) -> LiteEncoderLayer:
            return LiteEncoderLayer(
                step,
                key_aware=key_aware,
                small_ffn=small_ffn,
                chunk_size=chunk_size,
                **layer_cfg,
            )

        self._assemble(schedule, update, make_layer, num_cp, low_levels)
        self.num_layers = len(self.layers)
        self.key_aware = key_aware
        self.small_ffn = small_ffn

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Tensor | tuple[tuple[int, int], ...],
        level_start_index: Tensor | None,
        valid_ratios: Tensor | None,
        before_layer: BeforeLayer | None = None,
        **kwargs,
    ) -> Tensor:
        """Encode the flattened pyramid.

        Args:
            query (Tensor): Tokens of all levels, shape (bs, num_tokens, embed_dims).
            query_pos (Tensor): Their positional embedding, same shape.
            key_padding_mask (Tensor, optional): bool, True on padding, shape (bs, num_tokens).
            spatial_shapes (Tensor | tuple[tuple[int, int], ...]): (h, w) of each level, integer,
                shape (num_levels, 2).
            level_start_index (Tensor, optional): Not used: it follows from ``spatial_shapes``.
            valid_ratios (Tensor, optional): Valid part (w, h) of each level, shape
                (bs, num_levels, 2).
            before_layer (Callable, optional): See :meth:`mmlite.nn.LiteEncoder.forward`.

        Returns:
            Tensor: The memory, shape (bs, num_tokens, embed_dims).

        Raises:
            ValueError: The number of levels or tokens is not the schedule's.
        """
        return super().forward(
            query,
            query_pos,
            level_sizes(spatial_shapes),
            padding_mask=key_padding_mask,
            valid_ratios=valid_ratios,
            before_layer=before_layer,
        )
