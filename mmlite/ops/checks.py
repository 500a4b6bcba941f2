"""What the operators refuse, in one place: every implementation calls these where it runs.

Shapes may hold symbols, so that the same checks hold in traced graphs. Level sizes are the flat
list of the registered operators, h0, w0, h1, w1, ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def key_aware_deform_attn(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
) -> None:
    """Check the arguments of key-aware deformable attention.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other; the message says which.
    """
    _check_locations(value, spatial_shapes, sampling_locations)
    _check_features(query, key, value, sampling_locations)


def key_aware_deform_attn_from_offsets(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> None:
    """Check the arguments of key-aware deformable attention from offsets.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other; the message says which.
    """
    _check_offsets(value, spatial_shapes, reference_points, sampling_offsets)
    _check_features(query, key, value, sampling_offsets)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    """Check the arguments of standard deformable attention.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other; the message says which.
    """
    _check_locations(value, spatial_shapes, sampling_locations)
    _check_shape('attention_weights', attention_weights, sampling_locations.shape[:5])
    _check_points('attention_weights', attention_weights, value)


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_weights: Tensor,
) -> None:
    """Check the arguments of standard deformable attention from offsets.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other; the message says which.
    """
    _check_offsets(value, spatial_shapes, reference_points, sampling_offsets)
    batch, queries, heads, _, points, _ = sampling_offsets.shape
    levels = len(spatial_shapes) // 2
    _check_shape('attention_weights', attention_weights, (batch, queries, heads, levels, points))
    _check_points('attention_weights', attention_weights, value)


def key_aware_deform_attn_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    output_mask: Sequence[bool],
) -> None:
    """Check the arguments of the backward pass; see :func:`key_aware_deform_attn`."""
    key_aware_deform_attn(query, key, value, spatial_shapes, sampling_locations)
    _check_grad_output(grad_output, value, sampling_locations)
    _check_mask(output_mask, 4)


def key_aware_deform_attn_from_offsets_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    output_mask: Sequence[bool],
) -> None:
    """Check the arguments of the backward pass; see :func:`key_aware_deform_attn_from_offsets`."""
    key_aware_deform_attn_from_offsets(
        query, key, value, spatial_shapes, reference_points, sampling_offsets
    )
    _check_grad_output(grad_output, value, sampling_offsets)
    _check_mask(output_mask, 5)


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    output_mask: Sequence[bool],
) -> None:
    """Check the arguments of the backward pass; see :func:`ms_deform_attn`."""
    ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
    _check_grad_output(grad_output, value, sampling_locations)
    _check_mask(output_mask, 3)


def ms_deform_attn_from_offsets_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_weights: Tensor,
    output_mask: Sequence[bool],
) -> None:
    """Check the arguments of the backward pass; see :func:`ms_deform_attn_from_offsets`."""
    ms_deform_attn_from_offsets(
        value, spatial_shapes, reference_points, sampling_offsets, attention_weights
    )
    _check_grad_output(grad_output, value, sampling_offsets)
    _check_mask(output_mask, 4)


def _check_features(query: Tensor, key: Tensor | None, value: Tensor, sampling: Tensor) -> None:
    batch, queries, heads = sampling.shape[:3]
    _check_shape('query', query, (batch, queries, heads, value.shape[3]))
    _check_same('query', query, value)
    if key is not None:
        _check_shape('key', key, value.shape)
        _check_same('key', key, value)


def _check_locations(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor
) -> None:
    _check_sampling(value, 'sampling_locations', sampling_locations)
    levels = sampling_locations.shape[3]
    if len(spatial_shapes) != 2 * levels:
        raise ValueError(
            f'spatial_shapes must be {levels} pairs (h, w), as sampling_locations has {levels} '
            f'levels; got {_pairs(spatial_shapes)}'
        )
    _check_sizes(value, spatial_shapes)


def _check_offsets(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> None:
    _check_sampling(value, 'sampling_offsets', sampling_offsets)
    _check_given('reference_points', reference_points)
    shape = reference_points.shape
    if len(shape) != 4 or (shape[3] != 2 and shape[3] != 4):
        raise ValueError(
            'reference_points must be (B or 1, Q, L, 2), (x, y), or (B or 1, Q, L, 4), '
            f'(cx, cy, w, h); got shape {tuple(shape)}'
        )
    batch, queries, _, offset_levels, _, _ = sampling_offsets.shape
    levels = shape[2]
    if (shape[0] != 1 and shape[0] != batch) or shape[1] != queries:
        raise ValueError(
            f'reference_points must be for {batch} images (or 1, for all) and {queries} queries, '
            f'as sampling_offsets is; got shape {tuple(shape)}'
        )
    if len(spatial_shapes) != 2 * levels:
        raise ValueError(
            f'spatial_shapes must be {levels} pairs (h, w), as reference_points is for {levels} '
            f'levels; got {_pairs(spatial_shapes)}'
        )
    if offset_levels != 1 and offset_levels != levels:
        raise ValueError(
            f'sampling_offsets must be for {levels} levels, as reference_points is, or 1 for all '
            f'of them; got shape {tuple(sampling_offsets.shape)}'
        )
    _check_points('reference_points', reference_points, value)
    _check_sizes(value, spatial_shapes)


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


def _check_sizes(value: Tensor, spatial_shapes: Sequence[int]) -> None:
    total = 0
    for i in range(0, len(spatial_shapes), 2):
        height, width = spatial_shapes[i], spatial_shapes[i + 1]
        if height < 1 or width < 1:
            raise ValueError(f'spatial_shapes must be positive sizes; got {_pairs(spatial_shapes)}')
        total += height * width
    if total != value.shape[1]:
        raise ValueError(
            f'spatial_shapes {_pairs(spatial_shapes)} stands for {total} tokens, '
            f'but value has {value.shape[1]}'
        )


def _pairs(spatial_shapes: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(spatial_shapes[i : i + 2]) for i in range(0, len(spatial_shapes), 2)]


def _check_grad_output(grad_output: Tensor, value: Tensor, sampling: Tensor) -> None:
    batch, queries, heads = sampling.shape[:3]
    _check_shape('grad_output', grad_output, (batch, queries, heads * value.shape[3]))
    _check_same('grad_output', grad_output, value)


def _check_mask(output_mask: Sequence[bool], length: int) -> None:
    if len(output_mask) != length:
        raise ValueError(f'output_mask must have {length} entries; got {len(output_mask)}')


def _check_given(name: str, tensor: Tensor | None) -> None:
    # Torch's dispatcher lets None pass for a tensor.
    if tensor is None:
        raise ValueError(f'{name} must be a tensor; got None')


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    _check_given(name, tensor)
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
