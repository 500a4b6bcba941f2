"""The MMDetection face of :mod:`mmlite.nn`: names in the registry, mmcv's call signature.

Level sizes become Python ints here, at the door: below it no value is read out of a tensor.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.runner import Runner
from torch import Tensor

from .. import nn
from ..models import Change, changing, level_sizes, remember_level_sizes
from ..nn import EncoderSchedule, EncoderStep
from .families import num_levels_of

__all__ = [
    'EncoderSchedule',
    'EncoderStep',
    'FusedAttentionHook',
    'FusedDeformableAttention',
    'KeyAwareDeformableAttention',
    'LiteEncoder',
    'LiteEncoderLayer',
    'fuse_attention',
    'level_sizes',
    'remember_level_sizes',
]


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
        levels: Sequence[int] | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend to sampled points, as :meth:`mmlite.nn.DeformableAttention.forward`.

        Without ``batch_first`` query, value, identity, query_pos and the output have their first
        two axes swapped. ``spatial_shapes`` may be an int tensor (num_levels, 2). ``key``,
        ``level_start_index`` and what else mmcv's attention takes are not used.
        """
        tensors = [query, value, identity, query_pos]
        if not self.batch_first:
            tensors = [None if tensor is None else tensor.transpose(0, 1) for tensor in tensors]
        output = super().forward(
            *tensors,
            key_padding_mask,
            reference_points=reference_points,
            spatial_shapes=level_sizes(spatial_shapes),
            levels=levels,
        )
        return output if self.batch_first else output.transpose(0, 1)


@MODELS.register_module()
class FusedDeformableAttention(_MmcvCall, nn.DeformableAttention, MultiScaleDeformableAttention):
    """mmcv's ``MultiScaleDeformableAttention``, computed by :func:`mmlite.ops.ms_deform_attn`.

    Same arguments, parameters and numbers.
    """

    same_loc = False
    __init__ = MultiScaleDeformableAttention.__init__
    init_weights = MultiScaleDeformableAttention.init_weights


class _MmcvClass(MultiScaleDeformableAttention):
    """mmcv's attention without its layers: for classes that are mmcv's and bring their own."""

    def __init__(self) -> None:
        BaseModule.__init__(self)


@MODELS.register_module()
class KeyAwareDeformableAttention(_MmcvCall, nn.KeyAwareDeformableAttention, _MmcvClass):
    """:class:`mmlite.nn.KeyAwareDeformableAttention` (KDA; Lite DETR, section 4.3) for MMDetection.

    Arguments are those of mmcv's attention, and ``proj_key`` and ``same_loc`` of the one above;
    ``im2col_step`` and ``norm_cfg`` are not used. It is a ``MultiScaleDeformableAttention``:
    MMDetection re-initialises every matrix of the encoder and restores the offsets' directional
    grid in instances of that class alone.
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
        super().__init__(embed_dims, num_heads, num_levels, num_points, dropout, proj_key, same_loc)
        self.init_cfg = copy.deepcopy(init_cfg)
        self.im2col_step = im2col_step
        self.batch_first = batch_first
        self.norm_cfg = norm_cfg


class _Fused(FusedDeformableAttention):
    """mmcv's module: ours on CPUs and CUDA, mmcv's own kernels on all other devices."""

    def forward(self, query: Tensor, *args, **kwargs) -> Tensor:
        has_ours = query.is_cpu or query.is_cuda
        cls = FusedDeformableAttention if has_ours else MultiScaleDeformableAttention
        return cls.forward(self, query, *args, **kwargs)


def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Let mmcv's deformable attention run on :mod:`mmlite.ops`; see :func:`mmlite.fuse`.

    On CPUs and CUDA, in float32, float16 and bfloat16; under deterministic algorithms of torch the
    backward pass repeats bit for bit. On other devices, for which mmcv has kernels of its own, and
    in subclasses of mmcv's module everything stays as it is.
    """
    if not any(isinstance(part, MultiScaleDeformableAttention) for part in model.modules()):
        raise ValueError(f'{type(model).__name__} has no deformable attention of mmcv to fuse')
    count = fuse_attention(model)
    logging.getLogger('mmlite').info('fuse: %d deformable attentions run on mmlite.ops', count)
    return model


def fuse_attention(model: torch.nn.Module) -> int:
    """As :func:`fuse`, but of any model; returns the number of modules changed."""
    with changing(model, 'fuse') as change:
        return fuse_into(change, model)


def fuse_into(change: Change, model: torch.nn.Module) -> int:
    """:func:`fuse_attention` as a part of another change."""
    parts = model.named_modules()
    stock = [name for name, part in parts if type(part) is MultiScaleDeformableAttention]
    for name in stock:
        change.set(model, name, '__class__', _Fused)
    return len(stock)


class FusedAttentionHook(Hook):
    """Runs a stock detector's deformable attention on our kernels, in training and testing.

    mmcv has no CPU kernel for it, and its CUDA kernel knows no bfloat16 and adds up half precision
    in half precision, in no fixed order. A config of any detector gets ours with ::

        custom_imports = dict(imports=['mmlite'])
        custom_hooks = [dict(type='FusedAttentionHook')]
    """

    # Before the hooks that copy the model.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Change the runner's model, and log how many modules that concerns."""
        count = fuse_attention(runner.model)
        runner.logger.info(f'{count} deformable attention modules run fused')


@MODELS.register_module()
class LiteEncoderLayer(nn.LiteEncoderLayer, BaseModule):
    """:class:`mmlite.nn.LiteEncoderLayer` made of what MMDetection's configs describe.

    ``self_attn_cfg`` are arguments of the attention, ``ffn_cfg`` of mmcv's ``FFN``, ``norm_cfg`` is
    a config of norms; ``key_aware`` and what follows is as for :class:`LiteEncoder`.
    """

    def __init__(
        self,
        step: EncoderStep,
        self_attn_cfg: ConfigDict | dict | None = None,
        ffn_cfg: ConfigDict | dict | None = None,
        norm_cfg: ConfigDict | dict | None = None,
        key_aware: bool = True,
        small_ffn: bool = True,
        init_cfg: ConfigDict | dict | None = None,
        chunk_size: int | None = 1024,
    ) -> None:
        attention = KeyAwareDeformableAttention if key_aware else FusedDeformableAttention
        self_attn = attention(**{**(self_attn_cfg or {}), 'batch_first': True})
        dims = self_attn.embed_dims

        def norm() -> torch.nn.Module:
            return build_norm_layer(norm_cfg or {'type': 'LN'}, dims)[1]

        def make_ffn(channels: int | None) -> tuple[torch.nn.Module, torch.nn.Module]:
            changes = {'feedforward_channels': channels} if channels else {}
            return FFN(**{**(ffn_cfg or {}), **changes}), norm()

        super().__init__(step, self_attn, norm(), make_ffn, small_ffn, chunk_size)
        self.init_cfg = copy.deepcopy(init_cfg)


@MODELS.register_module()
class LiteEncoder(nn.InterleavedEncoder, BaseModule):
    """Interleaved multi-scale encoder (Lite DETR, section 4) for MMDetection's detectors.

    Takes the place of MMDetection's ``DeformableDetrTransformerEncoder``: same call, same output.
    Its parameters have the names of :class:`mmlite.nn.LiteEncoder`, of which are all arguments
    that are not named here.

    Args:
        schedule (str | EncoderSchedule): For example ``'H3L1-(2+1)x3'``.
        num_layers (int, optional): Layers of the stock encoder that this one replaces; must be
            A * B of the schedule. It is there because stock configs have it.
        layer_cfg (dict): ``self_attn_cfg``, ``ffn_cfg`` and ``norm_cfg`` of the stock layer;
            ``self_attn_cfg`` may hold ``proj_key`` and ``same_loc`` where ``key_aware`` is on.
        init_cfg (dict, optional): Initialisation config of mmengine.

    Raises:
        ValueError: The schedule is malformed, or does not fit ``num_layers`` or the number of
            levels of the attention; the message says what would fit.
    """

    def __init__(
        self,
        schedule: str | EncoderSchedule,
        num_layers: int | None = None,
        layer_cfg: ConfigDict | dict | None = None,
        key_aware: bool = True,
        small_ffn: bool = True,
        update: str = 'joint',
        num_cp: int = -1,
        init_cfg: ConfigDict | dict | None = None,
        low_levels: tuple[int, ...] | None = None,
        chunk_size: int | None = 1024,
        elastic: Sequence[str | EncoderSchedule] = (),
        recalibrate: bool = False,
    ) -> None:
        schedule, layer_cfg = EncoderSchedule.parse(schedule), layer_cfg or {}
        schedule.check_fit(num_layers, num_levels_of({'layer_cfg': layer_cfg}), update)
        options = dict(key_aware=key_aware, small_ffn=small_ffn, chunk_size=chunk_size, **layer_cfg)

        def make_layer(step: EncoderStep, stock: int) -> LiteEncoderLayer:
            return LiteEncoderLayer(step, **options)

        super().__init__(schedule, make_layer, update, num_cp, low_levels, elastic, recalibrate)
        self.init_cfg = copy.deepcopy(init_cfg)
        self.num_layers = len(self.layers)
        self.key_aware = key_aware
        self.small_ffn = small_ffn

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        level_start_index: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Encode the flattened pyramid; see :meth:`mmlite.nn.LiteEncoder.forward`.

        Arguments have MMDetection's names: ``query`` and ``query_pos`` are the tokens and their
        positional embedding, (bs, num_tokens, embed_dims), ``spatial_shapes`` the level sizes,
        which may be an int tensor (num_levels, 2). Those that are not named there are not used.
        """
        return super().forward(
            query,
            query_pos,
            level_sizes(spatial_shapes),
            padding_mask=key_padding_mask,
            valid_ratios=valid_ratios,
        )
