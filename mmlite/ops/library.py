"""The fused operators as ``torch.library`` knows them: schemas, shape functions, autograd, vmap.

A backend module implements the four operators for its dispatch key::

    library.implement('key_aware_deform_attn', 'CPU', forward)
    library.implement('key_aware_deform_attn_backward', 'CPU', backward)

Whoever calls them, what reaches an implementation has passed :mod:`mmlite.ops.checks`. Tensors may
have any strides; what an implementation returns is contiguous.

``spatial_shapes`` is flat, h0, w0, h1, w1, ..., and made of ints: no value is ever read out of a
tensor, and under ``torch.compile`` and ``torch.export`` the sizes may be symbols.

``key`` is ``None`` where the value serves as its own key; its gradient is then part of the
value's. ``output_mask`` says which gradients are wanted, in the order in which they are returned;
an empty tensor takes the place of the others. Backward recomputes the samples, so nothing but the
inputs is kept for it.

Written against the ``Library`` class, the one interface that torch 2.1 and later share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from . import checks

_LIBRARY = torch.library.Library('mmlite', 'DEF')
_LIBRARY.define(
    'key_aware_deform_attn(Tensor query, Tensor? key, Tensor value, SymInt[] spatial_shapes, '
    'Tensor sampling_locations) -> Tensor'
)
_LIBRARY.define(
    'key_aware_deform_attn_backward(Tensor grad_output, Tensor query, Tensor? key, Tensor value, '
    'SymInt[] spatial_shapes, Tensor sampling_locations, bool[] output_mask) '
    '-> (Tensor, Tensor, Tensor, Tensor)'
)
_LIBRARY.define(
    'ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, '
    'Tensor attention_weights) -> Tensor'
)
_LIBRARY.define(
    'ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, '
    'Tensor sampling_locations, Tensor attention_weights, bool[] output_mask) '
    '-> (Tensor, Tensor, Tensor)'
)

# The overloads themselves: looking them up takes longer than calling them.
key_aware_deform_attn = torch.ops.mmlite.key_aware_deform_attn.default
key_aware_deform_attn_backward = torch.ops.mmlite.key_aware_deform_attn_backward.default
ms_deform_attn = torch.ops.mmlite.ms_deform_attn.default
ms_deform_attn_backward = torch.ops.mmlite.ms_deform_attn_backward.default


def implement(name: str, dispatch_key: str, function: Callable) -> None:
    """Register ``function`` as operator ``name`` for a device (``'CPU'``, ``'CUDA'``), checked."""
    check = getattr(checks, name)

    @functools.wraps(function)
    def checked(*args):
        check(*args)
        return function(*args)

    _LIBRARY.impl(name, checked, dispatch_key)


# ------------------------------------------------------------------------------ shape functions


def _kda_shape(query, key, value, spatial_shapes, sampling_locations):
    batch, queries, heads, dim = query.shape
    return query.new_empty(batch, queries, heads * dim)


def _kda_backward_shape(
    grad_output, query, key, value, spatial_shapes, sampling_locations, output_mask
):
    return _empty_grads((query, key, value, sampling_locations), output_mask)


def _msda_shape(value, spatial_shapes, sampling_locations, attention_weights):
    batch, queries, heads = sampling_locations.shape[:3]
    return value.new_empty(batch, queries, heads * value.shape[3])


def _msda_backward_shape(
    grad_output, value, spatial_shapes, sampling_locations, attention_weights, output_mask
):
    return _empty_grads((value, sampling_locations, attention_weights), output_mask)


def _empty_grads(inputs: Sequence[Tensor | None], output_mask: Sequence[bool]):
    some = next(tensor for tensor in inputs if tensor is not None)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if wanted and tensor is not None
        else some.new_empty(0)
        for tensor, wanted in zip(inputs, output_mask)
    )


implement('key_aware_deform_attn', 'Meta', _kda_shape)
implement('key_aware_deform_attn_backward', 'Meta', _kda_backward_shape)
implement('ms_deform_attn', 'Meta', _msda_shape)
implement('ms_deform_attn_backward', 'Meta', _msda_backward_shape)


# ------------------------------------------------------------------------------------ autograd
#
# A single-level function is what autograd.Function is made of. Torch calls the operator once for
# every level of torch.func's transforms, which the plain autograd.Function cannot stand.


class _KeyAwareDeformAttn(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, query, key, value, spatial_shapes, sampling_locations):
        ctx.save_for_backward(query, key, value, sampling_locations)
        ctx.spatial_shapes = spatial_shapes
        return _below(
            key_aware_deform_attn, (query, key, value, spatial_shapes, sampling_locations)
        )

    @staticmethod
    def backward(ctx, grad_output):
        # Read once: activation checkpointing recomputes at the first look and refuses a second.
        query, key, value, locations = ctx.saved_tensors
        wants_query, wants_key, wants_value, _, wants_locations = ctx.needs_input_grad
        wanted = [wants_query, wants_key, wants_value, wants_locations]
        grads = key_aware_deform_attn_backward(
            grad_output, query, key, value, ctx.spatial_shapes, locations, wanted
        )
        query, key, value, locations = _only(grads, wanted)
        return query, key, value, None, locations


class _MsDeformAttn(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, value, spatial_shapes, sampling_locations, attention_weights):
        ctx.save_for_backward(value, sampling_locations, attention_weights)
        ctx.spatial_shapes = spatial_shapes
        return _below(
            ms_deform_attn, (value, spatial_shapes, sampling_locations, attention_weights)
        )

    @staticmethod
    def backward(ctx, grad_output):
        value, locations, weights = ctx.saved_tensors
        wants_value, _, wants_locations, wants_weights = ctx.needs_input_grad
        wanted = [wants_value, wants_locations, wants_weights]
        grads = ms_deform_attn_backward(
            grad_output, value, ctx.spatial_shapes, locations, weights, wanted
        )
        value, locations, weights = _only(grads, wanted)
        return value, None, locations, weights


def _below(operator: Callable, args: Sequence) -> Tensor | tuple[Tensor, ...]:
    """Call an operator from within its autograd function.

    Gradients are on again there, for the next level of torch.func's transforms has to see them.
    """
    with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _only(grads: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted)]


class _DifferentiableOnce(_SingleLevelFunction):
    """A backward pass, whose own gradients are refused where they are asked for."""

    @staticmethod
    def forward(ctx, operator, *args):
        return _below(operator, args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError('deformable attention cannot be differentiated twice')


def _differentiable(operator: Callable, apply: Callable) -> Callable:
    def call(*args):
        # Forward-mode tangents go there as well, to be refused rather than lost.
        if _needs_grad(args) or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():
                return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return call


def _needs_grad(args: Sequence) -> bool:
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


for _operator, _apply in {
    key_aware_deform_attn: _KeyAwareDeformAttn.apply,
    ms_deform_attn: _MsDeformAttn.apply,
    key_aware_deform_attn_backward: functools.partial(
        _DifferentiableOnce.apply, key_aware_deform_attn_backward
    ),
    ms_deform_attn_backward: functools.partial(_DifferentiableOnce.apply, ms_deform_attn_backward),
}.items():
    _LIBRARY.impl(_operator, _differentiable(_operator, _apply), 'Autograd')


# ---------------------------------------------------------------------------------------- vmap


def _into_batch(operator: Callable) -> Callable:
    """The vmap rule of an operator: what is mapped over becomes part of the batch."""

    def rule(info, in_dims, *args):
        size = info.batch_size

        def fold(arg, dim):
            if not isinstance(arg, Tensor):
                return arg
            arg = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return arg.flatten(0, 1)

        def unfold(result):
            return result.reshape(size, result.shape[0] // size, *result.shape[1:])

        results = operator(*(fold(arg, dim) for arg, dim in zip(args, in_dims)))
        if isinstance(results, Tensor):
            return unfold(results), 0
        # A gradient that nobody asked for is empty, and has one dimension alone.
        dims = tuple(0 if result.dim() > 1 else None for result in results)
        unfolded = (unfold(r) if dim == 0 else r for r, dim in zip(results, dims))
        return tuple(unfolded), dims

    return rule


if hasattr(torch.library, 'register_vmap'):  # torch 2.5; before, torch itself loops
    for _operator in (
        key_aware_deform_attn,
        key_aware_deform_attn_backward,
        ms_deform_attn,
        ms_deform_attn_backward,
    ):
        torch.library.register_vmap(
            _operator.name().split('.')[0], _into_batch(_operator), lib=_LIBRARY
        )
