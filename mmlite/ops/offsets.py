"""The operators from offsets by those that take locations, where a backend has nothing better.

The locations are worked out in PyTorch, and their gradient is brought to offsets and reference
points by the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library, reference


def key_aware_deform_attn_from_offsets(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> Tensor:
    """Forward; see :func:`mmlite.ops.key_aware_deform_attn_from_offsets`."""
    locations = locate(value, spatial_shapes, reference_points, sampling_offsets)
    return library.key_aware_deform_attn(query, key, value, spatial_shapes, locations)


def key_aware_deform_attn_from_offsets_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the tensors in their order, empty where not wanted."""
    locations = locate(value, spatial_shapes, reference_points, sampling_offsets)
    *features, wants_points, wants_offsets = output_mask
    *grads, grad_locations = library.key_aware_deform_attn_backward(
        grad_output,
        query,
        key,
        value,
        spatial_shapes,
        locations,
        [*features, wants_points or wants_offsets],
    )
    wanted = (wants_points, wants_offsets)
    inputs = (spatial_shapes, reference_points, sampling_offsets)
    return *grads, *_chain(grad_locations, *inputs, wanted)


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Forward; see :func:`mmlite.ops.ms_deform_attn_from_offsets`."""
    locations = locate(value, spatial_shapes, reference_points, sampling_offsets)
    return library.ms_deform_attn(value, spatial_shapes, locations, attention_weights)


def ms_deform_attn_from_offsets_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_weights: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the tensors in their order, empty where not wanted."""
    locations = locate(value, spatial_shapes, reference_points, sampling_offsets)
    wants_value, wants_points, wants_offsets, wants_weights = output_mask
    grad_value, grad_locations, grad_weights = library.ms_deform_attn_backward(
        grad_output,
        value,
        spatial_shapes,
        locations,
        attention_weights,
        [wants_value, wants_points or wants_offsets, wants_weights],
    )
    wanted = (wants_points, wants_offsets)
    inputs = (spatial_shapes, reference_points, sampling_offsets)
    return grad_value, *_chain(grad_locations, *inputs, wanted), grad_weights


def _pairs(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2]))


def locate(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> Tensor:
    """The sampling locations, shape (B, Q, M, L, P, 2).

    In float32 or float64: half precision would put them pixels beside their place.
    """
    points = reference_points.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
    return reference.sampling_locations(points, sampling_offsets, _pairs(spatial_shapes))


def _chain(
    grad_locations: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of reference points and offsets from that of the locations."""
    wants_points, wants_offsets = wanted
    grad_points = grad_offsets = reference_points.new_empty(0)
    is_box, points = reference_points.shape[-1] == 4, sampling_offsets.shape[4]
    half = 0.5 / points
    if wants_points:
        centre = grad_locations.sum((2, 4))  # (B, Q, L, 2)
        grad_points = centre
        if is_box:
            size = (grad_locations * sampling_offsets).sum((2, 4)) * half
            grad_points = torch.cat([centre, size], -1)
        if reference_points.shape[0] != grad_points.shape[0]:
            grad_points = grad_points.sum(0, keepdim=True)
        grad_points = grad_points.to(reference_points.dtype)
    if wants_offsets:
        if is_box:
            unit = reference_points.to(grad_locations.dtype).narrow(-1, 2, 2) * half
            unit = unit.unsqueeze(2).unsqueeze(4)
        else:
            unit = reference.pixel_sizes(_pairs(spatial_shapes), grad_locations).unsqueeze(1)
        grad_offsets = grad_locations * unit
        if sampling_offsets.shape[3] != grad_offsets.shape[3]:
            grad_offsets = grad_offsets.sum(3, keepdim=True)
        grad_offsets = grad_offsets.to(sampling_offsets.dtype)
    return grad_points, grad_offsets


for _operator in (
    key_aware_deform_attn_from_offsets,
    key_aware_deform_attn_from_offsets_backward,
    ms_deform_attn_from_offsets,
    ms_deform_attn_from_offsets_backward,
):
    library.implement(_operator.__name__, 'CPU', _operator)
