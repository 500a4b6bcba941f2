"""Floating-point operations and parameters, counted by one rule whichever backend runs.

The rule is that of fvcore (and of mmengine's ``get_model_complexity_info``), one multiply-add
counting as one; docs/benchmark.md states it in full. What it leaves open, the operators of
deformable attention, is settled by :func:`deform_attn_flops`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..nn.attention import KeyAwareDeformableAttention, SamplingAttention
from ..openmmlab.families import encoder_name, reads_text
from ..openmmlab.flops import deform_attn_flops, operator_rules
from ..openmmlab.layers import level_sizes
from .inputs import image_batch

# Stage -> names of its modules, MMDetection's and Hugging Face's; the first that fits decides.
_STAGE_OF = {
    'backbone': r'(model\.)?backbone|model\.pixel_level_module\.encoder',
    'neck': r'neck|(panoptic|decode)_head\.pixel_decoder|model\.input_proj(_vision)?',
    'encoder': r'(model\.)?encoder',
    'decoder': (
        r'(model\.)?decoder|(panoptic|decode)_head\.transformer_decoder|model\.transformer_module'
    ),
    'head': r'(bbox_|panoptic_|track_|decode_)?head|(class|bbox)_embed|class_predictor',
}
STAGES = (*_STAGE_OF, 'other')


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call, by the module that spent them."""

    # Dotted module name -> what it spent itself, submodules apart. '' is the called module.
    by_module: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_module.values())


@dataclass(frozen=True)
class Complexity:
    """What a detector costs on one image size."""

    image_size: tuple[int, int] | None  # height and width in pixels, where the model follows one
    flops: int  # of the network, post-processing apart
    params: int  # shared ones counted once, frozen ones included
    stage_flops: dict[str, int]  # of each of STAGES
    level_tokens: list[int]  # of each level of the encoder, in its order


def count_flops(module: nn.Module, *args, compute: bool = False, **kwargs) -> FlopCount:
    """Count the FLOPs of ``module(*args, **kwargs)``.

    Without ``compute`` what is counted yields zeros of the right shape, which takes a second or two
    for a detector.
    """
    counter = _FlopCounter(compute)
    with ExitStack() as stack:
        for name, child in module.named_modules():
            enter = partial(counter.enter, name)
            stack.enter_context(child.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(child.register_forward_hook(counter.leave))
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        module(*args, **kwargs)
    return FlopCount(dict(counter.flops))


def count_detector(
    model: nn.Module,
    image_size: tuple[int, int] | None,
    arguments: Mapping | tuple | None = None,
    encoder_at: str | None = '',
    compute: bool = False,
) -> Complexity:
    """Count what a model costs on one image; it is run in eval mode and left as it was.

    ``image_size`` is the height and width of the input in pixels. A model that is no detector of
    mmdet needs the ``arguments`` of its call, by name or by position, and the name of its
    multi-scale encoder. ``compute`` is that of :func:`count_flops`.
    """
    if arguments is None:
        arguments, encoder_at = detector_arguments(model, image_size), find_encoder(model)
    encoder = nn.Module() if encoder_at is None else model.get_submodule(encoder_at)
    was_training = model.training
    model.eval()
    try:
        with called_with(encoder) as encoder_call:
            count = call_with(partial(count_flops, model, compute=compute), arguments)
    finally:
        model.train(was_training)
    stages = dict.fromkeys(STAGES, 0)
    for name, flops in count.by_module.items():
        stages[stage_of(name, encoder_at)] += flops
    tokens = [h * w for h, w in level_sizes(encoder_call.get('spatial_shapes', ()))]
    params = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(image_size, count.total, params, stages, tokens)


def detector_arguments(model: nn.Module, image_size: tuple[int, int], batch_size: int = 1) -> dict:
    """What a detector of mmdet takes to run on drawn images of (h, w)."""
    images, samples = image_batch(batch_size, image_size, next(model.parameters()).device)
    # A detector that reads text has no other way to it, and MMSegmentation's Mask2Former no mode
    # 'tensor' that works.
    predicts = reads_text(model) or hasattr(model, 'decode_head')
    mode = 'predict' if predicts else 'tensor'
    return {'inputs': images, 'data_samples': samples, 'mode': mode}


class _Called(Exception):
    """Ends a run of a model where a part of it is called."""


def encoder_call(model: nn.Module, image_size: tuple[int, int]) -> dict:
    """What the encoder of a detector of mmdet is called with for an image of (h, w), by name.

    The detector runs up to there as :func:`count_flops` runs it, so the values are not those of a
    picture. ValueError where it has no multi-scale encoder.
    """

    def stop(*call) -> None:
        raise _Called(named_arguments(*call))

    encoder = model.get_submodule(encoder_name(model))
    with encoder.register_forward_pre_hook(stop, with_kwargs=True):
        try:
            count_flops(model.eval(), **detector_arguments(model, image_size))
        except _Called as called:
            return called.args[0]
    raise ValueError(f'{type(model).__name__} does not run its encoder')


def find_encoder(model: nn.Module) -> str | None:
    """Where a model of MMDetection keeps its multi-scale encoder; None where it has none."""
    try:
        return encoder_name(model)
    except ValueError:
        return None


def stage_of(module_name: str, encoder: str | None = 'encoder') -> str:
    """The one of :data:`STAGES` that a module belongs to.

    ``encoder`` is where the detector keeps its multi-scale encoder, '' where it is that alone.
    """
    if encoder == '' or (encoder and f'{module_name}.'.startswith(f'{encoder}.')):
        return 'encoder'
    stages = (s for s, names in _STAGE_OF.items() if re.match(rf'({names})(\.|$)', module_name))
    return next(stages, 'other')


def call_with(function: Callable, arguments: Mapping | tuple) -> Any:
    """Call a module or a function with arguments by position, a tuple, or by name."""
    return function(*arguments) if isinstance(arguments, tuple) else function(**arguments)


def named_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """What a module is called with, by the names of its ``forward``."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, args), **kwargs)


@contextmanager
def called_with(module: nn.Module) -> Iterator[dict]:
    """Catch the arguments that a module is called with in the ``with`` block, by their names."""
    caught: dict = {}
    with module.register_forward_pre_hook(
        lambda *call: caught.update(named_arguments(*call)), with_kwargs=True
    ):
        yield caught


class _FlopCounter(TorchDispatchMode):
    """Adds up the cost of every operator that reaches the dispatcher."""

    def __init__(self, compute: bool) -> None:
        super().__init__()
        self.compute = compute
        self.flops: Counter[str] = Counter()
        self.running: list[tuple[str, bool]] = [('', False)]  # name, is deformable attention

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        is_attention = isinstance(module, (MultiScaleDeformableAttention, SamplingAttention))
        self.running.append((name, is_attention))
        if is_attention:
            # From the shapes: backends run different operators, and mmcv's on CUDA is not seen.
            call = named_arguments(module, args, kwargs)
            query, levels = call['query'], call.get('levels')  # that it reads, if not all
            self.flops[name] += deform_attn_flops(
                query.shape[0] * query.shape[1],
                module.num_heads,
                (module.num_levels if levels is None else len(levels)) * module.num_points,
                module.value_proj.out_features // module.num_heads,
                key_aware=isinstance(module, KeyAwareDeformableAttention),
            )

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = kwargs or {}, func._overloadpacket
        if op not in FLOP_RULES:
            return func(*args, **kwargs)
        if self.compute:
            out = func(*args, **kwargs)
        else:
            device = next(a.device for a in args if isinstance(a, Tensor))
            shapes, kwargs = tree_map_only(Tensor, lambda t: t.to('meta'), (args, kwargs))
            out = func(*shapes, **kwargs)
            out = tree_map_only(Tensor, lambda t: torch.zeros_like(t, device=device), out)
        name, in_deform_attn = self.running[-1]
        if not (in_deform_attn and op in _SAMPLING):
            self.flops[name] += FLOP_RULES[op](args, out)
        return out


# The rule: operator -> FLOPs from its arguments and its result.


def _product(args: tuple, out: Tensor) -> int:
    return out.numel() * args[0].shape[-1]


def _convolution(args: tuple, out: Tensor) -> int:
    image, weight, transposed = args[0], args[1], args[6]
    positions = (image if transposed else out).shape[2:]
    return out.shape[0] * weight.numel() * math.prod(positions)


def _attention(args: tuple, out: Sequence[Tensor]) -> int:
    query, key, value = args[:3]
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _norm(weight: int, training: int | None = None) -> Callable:
    """Cost of a norm: 4 an element, 1 more with a weight, 3 less with known statistics."""

    def rule(args: tuple, out: Sequence[Tensor]) -> int:
        statistics = 4 if training is None or args[training] else 1
        return args[0].numel() * (statistics + (args[weight] is not None))

    return rule


_aten = torch.ops.aten
_rules = operator_rules(lambda tensor: tensor.shape)
_ours = {getattr(torch.ops.mmlite, name): rule for name, rule in _rules.items()}
_SAMPLING = {_aten.grid_sampler_2d, *_ours}
# Which of these there are depends on the version of torch.
_kinds = ('flash_attention', 'flash_attention_for_cpu', 'efficient_attention', 'cudnn_attention')
_fused_attention = [getattr(_aten, f'_scaled_dot_product_{kind}', None) for kind in _kinds]
FLOP_RULES = {
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.linear), _product),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm), lambda args, out: _product(args[1:], out)),
    **dict.fromkeys(filter(None, _fused_attention), _attention),
    _aten.convolution: _convolution,
    _aten.native_layer_norm: _norm(weight=2),
    _aten.native_group_norm: _norm(weight=1),
    **dict.fromkeys((_aten.native_batch_norm, _aten.cudnn_batch_norm), _norm(1, training=5)),
    _aten.upsample_nearest2d: lambda args, out: out.numel(),
    _aten.upsample_bilinear2d: lambda args, out: 4 * out.numel(),
    _aten._adaptive_avg_pool2d: lambda args, out: args[0].numel(),
    _aten.grid_sampler_2d: lambda args, out: 4 * out.numel(),
    **_ours,
}
