"""Floating-point operations and parameters, counted by one rule whichever backend runs.

The rule is that of fvcore (and of mmengine's ``get_model_complexity_info``), one multiply-add
counting as one; docs/complexity.md states it in full. What it leaves open, the operators of
deformable attention, is settled by :func:`deform_attn_flops`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .. import ops  # noqa: F401  (defines torch.ops.mmlite)
from ..layers import KeyAwareDeformableAttention

STAGES = ('backbone', 'neck', 'encoder', 'decoder', 'head', 'other')


def deform_attn_flops(
    queries: int, heads: int, points: int, head_dim: int, *, key_aware: bool
) -> int:
    """Cost of sampling and attending, without the linear layers around it.

    A bilinear sample costs 4 a channel. Key-aware attention samples a key and a value at each
    point and adds two products, ``q k`` and ``weights v``. Sampling is counted for both even
    where the key is the value and a kernel samples once. Standard attention weights its
    samples elementwise, which the rule does not count.

    Args:
        queries (int): Number of queries, summed over the batch.
        heads (int): Number of heads, M.
        points (int): Points of one head of one query over all levels, L*P.
        head_dim (int): Channels of a head, D.
        key_aware (bool): Key-aware or standard deformable attention.

    Returns:
        int: FLOPs.
    """
    channels = queries * heads * points * head_dim
    return (4 + 4 + 1 + 1) * channels if key_aware else 4 * channels


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call, by the module that spent them.

    Attributes:
        by_module (dict[str, int]): Dotted module name -> what it spent itself, submodules
            apart. ``''`` is the called module.
    """

    by_module: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_module.values())

    def of(self, prefix: str) -> int:
        """FLOPs of the module called ``prefix`` and everything in it."""
        return sum(
            flops
            for name, flops in self.by_module.items()
            if name == prefix or name.startswith(f'{prefix}.')
        )


@dataclass(frozen=True)
class Complexity:
    """What a detector costs on one image size.

    Attributes:
        image_size (tuple[int, int]): Height and width in pixels.
        flops (int): FLOPs of the network, post-processing apart.
        params (int): Number of parameters.
        stage_flops (dict[str, int]): FLOPs of each of :data:`STAGES`.
        stage_params (dict[str, int]): Parameters of each of :data:`STAGES`.
        encoder_layer_flops (list[int]): FLOPs of each encoder layer.
        level_tokens (list[int]): Tokens of each level of the encoder, largest map first.
    """

    image_size: tuple[int, int]
    flops: int
    params: int
    stage_flops: dict[str, int]
    stage_params: dict[str, int]
    encoder_layer_flops: list[int]
    level_tokens: list[int]


def count_flops(module: nn.Module, *args, compute: bool = False, **kwargs) -> FlopCount:
    """Count the FLOPs of ``module(*args, **kwargs)``.

    Args:
        module (nn.Module): What to call.
        compute (bool): Whether to really run what is counted. By default products,
            convolutions and samples yield zeros of the right shape, which makes counting a
            detector a matter of a second or two.
        *args: Positional arguments of the call.
        **kwargs: Keyword arguments of the call.

    Returns:
        FlopCount: FLOPs by module.
    """
    counter = _FlopCounter(compute)
    with torch.no_grad(), counter.watch(module), counter:
        module(*args, **kwargs)
    return FlopCount(dict(counter.flops))


def count_detector(model: nn.Module, image_size: tuple[int, int]) -> Complexity:
    """Count what an MMDetection detector costs on one image.

    Args:
        model (nn.Module): A detector of mmdet; it is run in eval mode and left as it was.
        image_size (tuple[int, int]): Height and width of the input in pixels.

    Returns:
        Complexity: FLOPs and parameters, whole and by stage.
    """
    from .inputs import image_batch

    images, samples = image_batch(1, image_size, device=next(model.parameters()).device)
    level_tokens: list[int] = []

    def remember_levels(module: nn.Module, args: tuple, kwargs: dict) -> None:
        level_tokens.extend(kwargs['spatial_shapes'].prod(-1).tolist())

    hooks = []
    if isinstance(getattr(model, 'encoder', None), nn.Module):
        hooks.append(model.encoder.register_forward_pre_hook(remember_levels, with_kwargs=True))
    was_training = model.training
    model.eval()
    try:
        count = count_flops(model, images, samples, mode='tensor')
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    stage_flops = dict.fromkeys(STAGES, 0)
    for name, flops in count.by_module.items():
        stage_flops[stage_of(name)] += flops
    stage_params = dict.fromkeys(STAGES, 0)
    for name, parameter in model.named_parameters():
        stage_params[stage_of(name)] += parameter.numel()
    layers = getattr(getattr(model, 'encoder', None), 'layers', ())
    return Complexity(
        image_size=image_size,
        flops=count.total,
        params=count_parameters(model),
        stage_flops=stage_flops,
        stage_params=stage_params,
        encoder_layer_flops=[count.of(f'encoder.layers.{i}') for i in range(len(layers))],
        level_tokens=level_tokens,
    )


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones counted once, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def stage_of(module_name: str) -> str:
    """The stage of a detector that a module belongs to, one of :data:`STAGES`."""
    root = module_name.split('.')[0]
    if root in ('bbox_head', 'head'):
        return 'head'
    return root if root in STAGES else 'other'


class _FlopCounter(TorchDispatchMode):
    """Adds up the cost of every operator that reaches the dispatcher."""

    def __init__(self, compute: bool) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self._compute = compute
        self._running: list[tuple[str, bool]] = []  # (module name, is deformable attention)

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Follow which submodule is running."""
        hooks = []
        for name, child in module.named_modules():
            hooks += [
                child.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                child.register_forward_hook(self._leave),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            is_deform_attn = isinstance(module, MultiScaleDeformableAttention)
            self._running.append((name, is_deform_attn))
            if is_deform_attn:
                # From the shapes rather than from the operators: mmcv's CUDA op is invisible
                # to the dispatcher, and every backend runs different operators.
                query = args[0] if args else kwargs['query']
                self.flops[name] += deform_attn_flops(
                    query.shape[0] * query.shape[1],
                    module.num_heads,
                    module.num_levels * module.num_points,
                    module.value_proj.out_features // module.num_heads,
                    key_aware=isinstance(module, KeyAwareDeformableAttention),
                )

        return hook

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = func._overloadpacket
        rule = FLOP_RULES.get(op)
        if rule is None:
            return func(*args, **kwargs)
        out = func(*args, **kwargs) if self._compute else _zeros_like_result(func, args, kwargs)
        name, in_deform_attn = self._running[-1] if self._running else ('', False)
        if not (in_deform_attn and op in SAMPLING_OPS):
            self.flops[name] += rule(args, out)
        return out


def register_flop_handles() -> None:
    """Teach mmengine's ``get_model_complexity_info``, hence mmdet's ``get_flops``, our operators.

    It counts on a traced graph and skips operators that it does not know.
    """
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(
        {
            'mmlite::key_aware_deform_attn': _traced(locations=4, value=2, key_aware=True),
            'mmlite::ms_deform_attn': _traced(locations=2, value=0, key_aware=False),
        }
    )


def _zeros_like_result(func, args: tuple, kwargs: dict):
    device = next(a.device for a in args if isinstance(a, Tensor))
    args, kwargs = tree_map_only(Tensor, lambda t: t.to('meta'), (args, kwargs))
    if 'device' in kwargs:
        kwargs['device'] = torch.device('meta')
    return tree_map_only(
        Tensor, lambda t: torch.zeros_like(t, device=device), func(*args, **kwargs)
    )


# The rule: operator -> FLOPs from its arguments and its result.


def _product(args: tuple, out: Tensor) -> int:
    """``a @ b`` costs the size of the result times the length of the sum."""
    return out.numel() * args[0].shape[-1]


def _product_with_bias(args: tuple, out: Tensor) -> int:
    return _product(args[1:], out)


def _convolution(args: tuple, out: Tensor) -> int:
    image, weight, transposed = args[0], args[1], args[6]
    positions = (image if transposed else out).shape[2:]
    return out.shape[0] * weight.numel() * math.prod(positions)


def _attention(args: tuple, out: Sequence[Tensor]) -> int:
    query, key, value = args[:3]
    heads = math.prod(query.shape[:-2])
    return heads * query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _norm(weight_index: int):
    def rule(args: tuple, out: Sequence[Tensor]) -> int:
        return args[0].numel() * (4 if args[weight_index] is None else 5)

    return rule


def _batch_norm(args: tuple, out: Sequence[Tensor]) -> int:
    affine, training = args[1] is not None, args[5]
    if training:
        return args[0].numel() * (5 if affine else 4)
    return args[0].numel() * (2 if affine else 1)


def _per_input(scale: int):
    return lambda args, out: scale * args[0].numel()


def _per_output(scale: int):
    return lambda args, out: scale * out.numel()


def _key_aware(args: tuple, out: Tensor) -> int:
    return _from_shapes(args[4].shape, args[2].shape, key_aware=True)


def _standard(args: tuple, out: Tensor) -> int:
    return _from_shapes(args[2].shape, args[0].shape, key_aware=False)


def _from_shapes(locations: Sequence[int], value: Sequence[int], *, key_aware: bool) -> int:
    batch, queries, heads, levels, points, _ = locations
    return deform_attn_flops(
        batch * queries, heads, levels * points, value[-1], key_aware=key_aware
    )


def _traced(locations: int, value: int, *, key_aware: bool):
    """A handle of mmengine's analyzer: FLOPs from the values of the traced graph."""

    def handle(inputs: Sequence[torch._C.Value], outputs: Sequence[torch._C.Value]) -> int:
        return _from_shapes(
            get_shape(inputs[locations]), get_shape(inputs[value]), key_aware=key_aware
        )

    return handle


_aten = torch.ops.aten
FLOP_RULES = {
    _aten.mm: _product,
    _aten.bmm: _product,
    _aten.addmm: _product_with_bias,
    _aten.baddbmm: _product_with_bias,
    _aten.linear: _product,
    _aten.convolution: _convolution,
    _aten.native_layer_norm: _norm(2),
    _aten.native_group_norm: _norm(1),
    _aten.native_batch_norm: _batch_norm,
    _aten.cudnn_batch_norm: _batch_norm,
    _aten.upsample_nearest2d: _per_output(1),
    _aten.upsample_bilinear2d: _per_output(4),
    _aten._adaptive_avg_pool2d: _per_input(1),
    _aten.grid_sampler_2d: _per_output(4),
    torch.ops.mmlite.key_aware_deform_attn: _key_aware,
    torch.ops.mmlite.ms_deform_attn: _standard,
}
for _name in (
    'flash_attention',
    'flash_attention_for_cpu',
    'efficient_attention',
    'cudnn_attention',
):
    # Which of these there are depends on the version of torch.
    if hasattr(_aten, f'_scaled_dot_product_{_name}'):
        FLOP_RULES[getattr(_aten, f'_scaled_dot_product_{_name}')] = _attention
MATRIX_PRODUCTS = {_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm, _aten.linear}
SAMPLING_OPS = {
    _aten.grid_sampler_2d,
    torch.ops.mmlite.key_aware_deform_attn,
    torch.ops.mmlite.ms_deform_attn,
}

register_flop_handles()
