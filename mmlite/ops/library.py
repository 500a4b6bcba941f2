"""The fused operators as ``torch.library`` knows them: schemas, shape functions, autograd, vmap.

Either attention comes in two forms: with sampling locations, and ``*_from_offsets`` with reference
points and the offsets around them, from which the locations are worked out where they are used. A
backend module implements the operators for its dispatch key::

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
_OFFSETS = 'Tensor reference_points, Tensor sampling_offsets'
_ARGUMENTS = {
    'key_aware_deform_attn': (
        'Tensor query, Tensor? key, Tensor value, SymInt[] spatial_shapes, '
        'Tensor sampling_locations'
    ),
    'key_aware_deform_attn_from_offsets': (
        f'Tensor query, Tensor? key, Tensor value, SymInt[] spatial_shapes, {_OFFSETS}'
    ),
    'ms_deform_attn': (
        'Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights'
    ),
    'ms_deform_attn_from_offsets': (
        f'Tensor value, SymInt[] spatial_shapes, {_OFFSETS}, Tensor attention_weights'
    ),
}
for _name, _arguments in _ARGUMENTS.items():
    _grads = ', '.join(['Tensor'] * _arguments.count('Tensor'))
    _LIBRARY.define(f'{_name}({_arguments}) -> Tensor')
    _LIBRARY.define(
        f'{_name}_backward(Tensor grad_output, {_arguments}, bool[] output_mask) -> ({_grads})'
    )

# The overloads themselves: looking them up takes longer than calling them.
_ops = torch.ops.mmlite
key_aware_deform_attn = _ops.key_aware_deform_attn.default
key_aware_deform_attn_backward = _ops.key_aware_deform_attn_backward.default
key_aware_deform_attn_from_offsets = _ops.key_aware_deform_attn_from_offsets.default
key_aware_deform_attn_from_offsets_backward = (
    _ops.key_aware_deform_attn_from_offsets_backward.default
)
ms_deform_attn = _ops.ms_deform_attn.default
ms_deform_attn_backward = _ops.ms_deform_attn_backward.default
ms_deform_attn_from_offsets = _ops.ms_deform_attn_from_offsets.default
ms_deform_attn_from_offsets_backward = _ops.ms_deform_attn_from_offsets_backward.default

# Every operator and its backward pass.
_PAIRS = (
    (key_aware_deform_attn, key_aware_deform_attn_backward),
    (key_aware_deform_attn_from_offsets, key_aware_deform_attn_from_offsets_backward),
    (ms_deform_attn, ms_deform_attn_backward),
    (ms_deform_attn_from_offsets, ms_deform_attn_from_offsets_backward),
)


def implement(name: str, dispatch_key: str, function: Callable) -> None:
    """Register ``function`` as operator ``name`` for a device (``'CPU'``, ``'CUDA'``), checked."""
    check = getattr(checks, name)

    @functools.wraps(function)
    def checked(*args):
        check(*args)
        return function(*args)

    _LIBRARY.impl(name, checked, dispatch_key)


def _name_of(operator: Callable) -> str:
    return operator._schema.name.partition('::')[2]


def _argument_names(operator: Callable) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


# ------------------------------------------------------------------------------ shape functions


def _output_shape(operator: Callable) -> Callable:
    names = _argument_names(operator)
    value = names.index('value')
    sampling = next(i for i, name in enumerate(names) if name.startswith('sampling_'))

    def shape(*args):
        batch, queries, heads = args[sampling].shape[:3]
        return args[value].new_empty(batch, queries, heads * args[value].shape[3])

    return shape


def _grad_shapes(grad_output, *args):
    *inputs, output_mask = args
    tensors = [arg for arg in inputs if arg is None or isinstance(arg, Tensor)]
    some = next(tensor for tensor in tensors if tensor is not None)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if wanted and tensor is not None
        else some.new_empty(0)
        for tensor, wanted in zip(tensors, output_mask)
    )


for _forward, _backward in _PAIRS:
    implement(_name_of(_forward), 'Meta', _output_shape(_forward))
    implement(_name_of(_backward), 'Meta', _grad_shapes)


# ------------------------------------------------------------------------------------ autograd
#
# A single-level function is what autograd.Function is made of. Torch calls the operator once for
# every level of torch.func's transforms, which the plain autograd.Function cannot stand.


def _function_of(operator: Callable, backward_operator: Callable) -> type[_SingleLevelFunction]:
    """The autograd function of an operator: keeps its inputs, of which all are tensors but one."""
    sizes = _argument_names(operator).index('spatial_shapes')

    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args[:sizes], *args[sizes + 1 :])
            ctx.spatial_shapes = args[sizes]
            return _below(operator, args)

        @staticmethod
        def backward(ctx, grad_output):
            # Read once: activation checkpointing recomputes at the first look and refuses a second.
            args = list(ctx.saved_tensors)
            args.insert(sizes, ctx.spatial_shapes)
            wanted = list(ctx.needs_input_grad)
            del wanted[sizes]
            grads = backward_operator(grad_output, *args, wanted)
            grads = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted)]
            grads.insert(sizes, None)
            return tuple(grads)

    return Function


def _below(operator: Callable, args: Sequence) -> Tensor | tuple[Tensor, ...]:
    """Call an operator from within its autograd function.

    Gradients are on again there, for the next level of torch.func's transforms has to see them.
    """
    with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


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


for _forward, _backward in _PAIRS:
    _apply = _function_of(_forward, _backward).apply
    _LIBRARY.impl(_forward, _differentiable(_forward, _apply), 'Autograd')
    _apply = functools.partial(_DifferentiableOnce.apply, _backward)
    _LIBRARY.impl(_backward, _differentiable(_backward, _apply), 'Autograd')


# ---------------------------------------------------------------------------------------- vmap


def _into_batch(operator: Callable) -> Callable:
    """The vmap rule of an operator: what is mapped over becomes part of the batch."""
    names = _argument_names(operator)
    value = names.index('value')
    broadcast = names.index('reference_points') if 'reference_points' in names else None

    def rule(info, in_dims, *args):
        size = info.batch_size
        mapped = [
            (arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0))
            if isinstance(arg, Tensor)
            else arg
            for arg, dim in zip(args, in_dims)
        ]
        shared = None  # reference points that serve the whole batch get a copy for each of it
        if broadcast is not None and mapped[broadcast].shape[1] != mapped[value].shape[1]:
            shared = mapped[broadcast]
            mapped[broadcast] = shared.expand(-1, mapped[value].shape[1], -1, -1, -1)

        def unfold(result):
            return result.reshape(size, result.shape[0] // size, *result.shape[1:])

        results = operator(
            *(arg.flatten(0, 1) if isinstance(arg, Tensor) else arg for arg in mapped)
        )
        if isinstance(results, Tensor):
            return unfold(results), 0
        # A gradient that nobody asked for is empty, and has one dimension alone.
        dims = tuple(0 if result.dim() > 1 else None for result in results)
        unfolded = [unfold(r) if dim == 0 else r for r, dim in zip(results, dims)]
        if shared is not None:
            index = [n for n in names if n not in ('grad_output', 'spatial_shapes')].index(
                'reference_points'
            )
            if dims[index] == 0:
                unfolded[index] = unfolded[index].sum(1, keepdim=True)
        return tuple(unfolded), dims

    return rule


if hasattr(torch.library, 'register_vmap'):  # torch 2.5; before, torch itself loops
    for _operator in (operator for pair in _PAIRS for operator in pair):
        torch.library.register_vmap(
            _operator.name().split('.')[0], _into_batch(_operator), lib=_LIBRARY
        )
