"""The fused operators as ``torch.library`` knows them: schemas, shape functions, autograd.

A backend module implements the four operators for its dispatch key::

    library.implement('key_aware_deform_attn', 'CPU', forward)
    library.implement('key_aware_deform_attn_backward', 'CPU', backward)

``spatial_shapes`` is flat, h0, w0, h1, w1, ..., and made of ints: no value is ever read out of a
tensor, and under ``torch.compile`` and ``torch.export`` the sizes may be symbols.

``key`` is ``None`` where the value serves as its own key; its gradient is then part of the
value's, and the gradient returned in its place is empty. Backward recomputes the samples, so
nothing but the inputs is kept for it. An implementation may assume that
:mod:`mmlite.ops.functional` has checked the arguments, but not that they are contiguous;
what it returns is contiguous.

Written against the ``Library`` class, the one interface that torch 2.1 and later share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library('mmlite', 'DEF')
_LIBRARY.define(
    'key_aware_deform_attn(Tensor query, Tensor? key, Tensor value, SymInt[] spatial_shapes, '
    'Tensor sampling_locations) -> Tensor'
)
_LIBRARY.define(
    'key_aware_deform_attn_backward(Tensor grad_output, Tensor query, Tensor? key, Tensor value, '
    'SymInt[] spatial_shapes, Tensor sampling_locations) -> (Tensor, Tensor, Tensor, Tensor)'
)
_LIBRARY.define(
    'ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, '
    'Tensor attention_weights) -> Tensor'
)
_LIBRARY.define(
    'ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, '
    'Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)'
)


def implement(name: str, dispatch_key: str, function: Callable) -> None:
    """Register ``function`` as operator ``name`` for one device (``'CPU'`` or ``'CUDA'``)."""
    _LIBRARY.impl(name, function, dispatch_key)


def key_aware_deform_attn(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
) -> Tensor:
    """Call the fused operator; arguments as for the reference."""
    return torch.ops.mmlite.key_aware_deform_attn(
        query, key, value, _flat(spatial_shapes), sampling_locations
    )


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Call the fused operator; arguments as for the reference."""
    return torch.ops.mmlite.ms_deform_attn(
        value, _flat(spatial_shapes), sampling_locations, attention_weights
    )


def _flat(spatial_shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [size for shape in spatial_shapes for size in shape]


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _kda_shape(query, key, value, spatial_shapes, sampling_locations):
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2] * query.shape[3])


def _kda_backward_shape(grad_output, query, key, value, spatial_shapes, sampling_locations):
    return (
        _empty_like(query),
        value.new_empty(0) if key is None else _empty_like(key),
        _empty_like(value),
        _empty_like(sampling_locations),
    )


def _msda_shape(value, spatial_shapes, sampling_locations, attention_weights):
    batch, queries, heads = sampling_locations.shape[:3]
    return value.new_empty(batch, queries, heads * value.shape[3])


def _msda_backward_shape(grad_output, value, spatial_shapes, sampling_locations, attention_weights):
    return _empty_like(value), _empty_like(sampling_locations), _empty_like(attention_weights)


class _KeyAwareDeformAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, spatial_shapes, sampling_locations):
        ctx.save_for_backward(query, key, value, sampling_locations)
        ctx.spatial_shapes = spatial_shapes
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mmlite.key_aware_deform_attn(
                query, key, value, spatial_shapes, sampling_locations
            )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        # Read once: activation checkpointing recomputes at the first look and refuses a second.
        query, key, value, locations = ctx.saved_tensors
        grad_query, grad_key, grad_value, grad_locations = (
            torch.ops.mmlite.key_aware_deform_attn_backward(
                grad_output, query, key, value, ctx.spatial_shapes, locations
            )
        )
        return grad_query, None if key is None else grad_key, grad_value, None, grad_locations


class _MsDeformAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, spatial_shapes, sampling_locations, attention_weights):
        ctx.save_for_backward(value, sampling_locations, attention_weights)
        ctx.spatial_shapes = spatial_shapes
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mmlite.ms_deform_attn(
                value, spatial_shapes, sampling_locations, attention_weights
            )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        value, locations, weights = ctx.saved_tensors
        grad_value, grad_locations, grad_weights = torch.ops.mmlite.ms_deform_attn_backward(
            grad_output, value, ctx.spatial_shapes, locations, weights
        )
        return grad_value, None, grad_locations, grad_weights


_LIBRARY.impl('key_aware_deform_attn', _kda_shape, 'Meta')
_LIBRARY.impl('key_aware_deform_attn_backward', _kda_backward_shape, 'Meta')
_LIBRARY.impl('ms_deform_attn', _msda_shape, 'Meta')
_LIBRARY.impl('ms_deform_attn_backward', _msda_backward_shape, 'Meta')
_LIBRARY.impl('key_aware_deform_attn', _KeyAwareDeformAttn.apply, 'Autograd')
_LIBRARY.impl('ms_deform_attn', _MsDeformAttn.apply, 'Autograd')
