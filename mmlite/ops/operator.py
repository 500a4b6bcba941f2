"""The registered operator of deformable attention: its schema, checks, shapes and autograd.

One operator computes both attentions, at points that are given in two ways:

- Standard attention has ``attention_weights``. Key-aware attention has a ``query`` instead, and a
  ``key``, which is None where the value serves as its own key.
- Without ``reference_points``, ``sampling`` holds normalised locations (B, Q, M, L, P, 2). With
  them it holds offsets around them, (B, Q, M, 1 or L, P, 2), and the kernels work out the
  locations where they use them.

``spatial_shapes`` is flat, h0, w0, h1, w1, ..., and made of ints: no value is ever read out of a
tensor, and under ``torch.compile`` and ``torch.export`` the sizes may be symbols.

The backward pass returns the gradients of the six tensors in their order. ``output_mask`` says
which are wanted; an empty tensor takes the place of the others. It samples anew, so nothing but
the inputs is kept for it.

A backend registers its two functions with :func:`implement`. Whoever calls the operator, they
get arguments that fit each other. Tensors may have any strides; results are contiguous.

Written against the ``Library`` class, the one interface that torch 2.1 and later share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library('mmlite', 'DEF')
_ARGUMENTS = (
    'Tensor? query, Tensor? key, Tensor value, SymInt[] spatial_shapes, '
    'Tensor? reference_points, Tensor sampling, Tensor? attention_weights'
)
_GRADS = ', '.join(6 * ['Tensor'])
_LIBRARY.define(f'deform_attn({_ARGUMENTS}) -> Tensor')
_LIBRARY.define(
    f'deform_attn_backward(Tensor grad_output, {_ARGUMENTS}, bool[] output_mask) -> ({_GRADS})'
)
# The overloads themselves: looking them up takes longer than calling them.
deform_attn = torch.ops.mmlite.deform_attn.default
deform_attn_backward = torch.ops.mmlite.deform_attn_backward.default

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors_of(arguments: Sequence) -> tuple:
    """The six tensors among the operator's arguments."""
    return (*arguments[:3], *arguments[4:7])


def implement(dispatch_key: str, forward: Callable, backward: Callable) -> None:
    """Register a backend's functions for a device (``'CPU'``, ``'CUDA'``), with checks before."""

    def checked_forward(*arguments):
        check(*arguments)
        return forward(*arguments)

    def checked_backward(grad_output, *arguments):
        check(*arguments[:-1])
        _check_backward(grad_output, *arguments)
        return backward(grad_output, *arguments)

    _LIBRARY.impl('deform_attn', checked_forward, dispatch_key)
    _LIBRARY.impl('deform_attn_backward', checked_backward, dispatch_key)


# ---------------------------------------------------------------------------- shape functions


def _output(query, key, value, spatial_shapes, reference_points, sampling, attention_weights):
    batch, queries, heads = sampling.shape[:3]
    return value.new_empty(batch, queries, heads * value.shape[3])


def _grads(grad_output, *arguments):
    return tuple(
        grad_output.new_empty(0) if tensor is None or not wanted else tensor.new_empty(tensor.shape)
        for tensor, wanted in zip(tensors_of(arguments), arguments[-1])
    )


implement('Meta', _output, _grads)


# ----------------------------------------------------------------------------------- autograd


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*tensors_of(arguments))
        ctx.spatial_shapes = arguments[3]
        with torch._C._AutoDispatchBelowAutograd():
            return deform_attn(*arguments)

    @staticmethod
    def backward(ctx, grad_output):
        # Read once: activation checkpointing recomputes at the first look and refuses a second.
        tensors = ctx.saved_tensors
        wanted = [needed for i, needed in enumerate(ctx.needs_input_grad) if i != 3]
        grads = deform_attn_backward(
            grad_output, *tensors[:3], ctx.spatial_shapes, *tensors[3:], wanted
        )
        grads = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted)]
        return (*grads[:3], None, *grads[3:])


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return deform_attn_backward(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError('deformable attention cannot be differentiated twice')


def _differentiable(operator: Callable, function: type[torch.autograd.Function]) -> Callable:
    def call(*arguments):
        # Forward-mode tangents go there as well, to be refused rather than lost.
        if _needs_grad(arguments) or forward_ad._current_level >= 0:
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call


def _needs_grad(arguments: Sequence) -> bool:
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


_LIBRARY.impl('deform_attn', _differentiable(deform_attn, _Attention), 'Autograd')
_LIBRARY.impl(
    'deform_attn_backward', _differentiable(deform_attn_backward, _AttentionBackward), 'Autograd'
)


# ------------------------------------------------------------------------------------- checks


def check(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor | None,
    sampling: Tensor,
    attention_weights: Tensor | None,
) -> None:
    """Check the operator's arguments. Shapes may hold symbols.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other; the message says which.
    """
    name = 'sampling_locations' if reference_points is None else 'sampling_offsets'
    _check_sampling(value, name, sampling)
    batch, queries, heads, levels, points, _ = sampling.shape
    if reference_points is not None:
        _check_reference_points(reference_points, sampling, value)
        levels = reference_points.shape[2]
    _check_sizes(value, spatial_shapes, levels)
    if reference_points is not None and sampling.shape[3] != 1 and sampling.shape[3] != levels:
        raise ValueError(
            f'sampling_offsets must be for {levels} levels, as reference_points is, or 1 for all '
            f'of them; got shape {tuple(sampling.shape)}'
        )
    if attention_weights is not None:
        _check_shape(
            'attention_weights', attention_weights, (batch, queries, heads, levels, points)
        )
        _check_points('attention_weights', attention_weights, value)
        if query is not None or key is not None:
            raise ValueError('query and key must be None where attention_weights is given')
        return
    if query is None:
        raise ValueError('query must be a tensor where attention_weights is None; got None')
    _check_shape('query', query, (batch, queries, heads, value.shape[3]))
    _check_same('query', query, value)
    if key is not None:
        _check_shape('key', key, value.shape)
        _check_same('key', key, value)


def _check_backward(
    grad_output, query, key, value, spatial_shapes, reference_points, sampling, *others
) -> None:
    batch, queries, heads = sampling.shape[:3]
    _check_given('grad_output', grad_output)
    _check_shape('grad_output', grad_output, (batch, queries, heads * value.shape[3]))
    _check_same('grad_output', grad_output, value)
    output_mask = others[-1]
    if len(output_mask) != 6:
        raise ValueError(f'output_mask must have 6 entries; got {len(output_mask)}')


def _check_sampling(value: Tensor, name: str, sampling: Tensor) -> None:
    """Locations or offsets, and the value that is sampled there."""
    _check_given('value', value)
    _check_given(name, sampling)
    if value.dim() != 4:
        raise ValueError(f'value must be (B, S, M, D); got shape {tuple(value.shape)}')
    if value.dtype not in _FLOATS:
        raise ValueError(f'value must be a floating-point tensor; got {value.dtype}')
    shape = sampling.shape
    if len(shape) != 6 or shape[5] != 2:
        raise ValueError(f'{name} must be (B, Q, M, L, P, 2); got shape {tuple(shape)}')
    batch, _, heads, dim = value.shape
    if heads < 1 or dim < 1:
        raise ValueError(
            f'value must have a head and a channel at least; got shape {tuple(value.shape)}'
        )
    if shape[3] < 1 or shape[4] < 1:
        raise ValueError(f'{name} must have a level and a point at least; got shape {tuple(shape)}')
    if shape[0] != batch or shape[2] != heads:
        raise ValueError(
            f'{name} has batch {shape[0]} and {shape[2]} heads, '
            f'but value has batch {batch} and {heads} heads'
        )
    _check_points(name, sampling, value)


def _check_reference_points(reference_points: Tensor, offsets: Tensor, value: Tensor) -> None:
    shape = reference_points.shape
    if len(shape) != 4 or (shape[3] != 2 and shape[3] != 4):
        raise ValueError(
            'reference_points must be (B or 1, Q, L, 2), (x, y), or (B or 1, Q, L, 4), '
            f'(cx, cy, w, h); got shape {tuple(shape)}'
        )
    batch, queries = offsets.shape[:2]
    if (shape[0] != 1 and shape[0] != batch) or shape[1] != queries:
        raise ValueError(
            f'reference_points must be for {batch} images (or 1, for all) and {queries} queries, '
            f'as sampling_offsets is; got shape {tuple(shape)}'
        )
    _check_points('reference_points', reference_points, value)


def _check_sizes(value: Tensor, spatial_shapes: Sequence[int], levels: int) -> None:
    pairs = [tuple(spatial_shapes[i : i + 2]) for i in range(0, len(spatial_shapes), 2)]
    if len(spatial_shapes) != 2 * levels:
        raise ValueError(
            f'spatial_shapes must be {levels} pairs (h, w), one for each level of the points; '
            f'got {pairs}'
        )
    total = 0
    for height, width in pairs:
        if height < 1 or width < 1:
            raise ValueError(f'spatial_shapes must be positive sizes; got {pairs}')
        total += height * width
    if total != value.shape[1]:
        raise ValueError(
            f'spatial_shapes {pairs} stands for {total} tokens, but value has {value.shape[1]}'
        )


def _check_given(name: str, tensor: Tensor | None) -> None:
    # Torch's dispatcher lets None pass for a tensor.
    if tensor is None:
        raise ValueError(f'{name} must be a tensor; got None')


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != shape:
        raise ValueError(f'{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}')


def _check_same(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.dtype != value.dtype or tensor.device != value.device:
        raise ValueError(
            f'{name} is {tensor.dtype} on {tensor.device}, '
            f'but value is {value.dtype} on {value.device}'
        )


def _check_points(name: str, tensor: Tensor, value: Tensor) -> None:
    """Locations and their like: float32 or the dtype of the value, and for float64 that alone."""
    if tensor.device != value.device:
        raise ValueError(f'{name} is on {tensor.device}, but value is on {value.device}')
    dtype = tensor.dtype
    if dtype != value.dtype and (dtype != torch.float32 or value.dtype == torch.float64):
        allowed = {value.dtype} if value.dtype == torch.float64 else {torch.float32, value.dtype}
        raise ValueError(
            f'{name} must be {" or ".join(sorted(map(str, allowed)))}; got {tensor.dtype}'
        )
