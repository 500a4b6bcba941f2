"""The operators written plainly in PyTorch: the truth that every fused kernel is tested against.

Nothing here is registered or dispatched; autograd differentiates these functions as they stand.
Half-precision inputs are computed in float32 and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deform_attn(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor | None,
    sampling: Tensor,
    attention_weights: Tensor | None,
) -> Tensor:
    """What the registered operator computes; see :mod:`mmlite.ops.operator`.

    Locations are formed in float32: half precision would put them pixels beside their place.
    """
    if reference_points is not None:
        reference_points = compute_dtype(reference_points)
        sampling = sampling_locations(reference_points, sampling, spatial_shapes)
    if query is not None:
        return key_aware_deform_attn(query, key, value, spatial_shapes, sampling)
    assert attention_weights is not None
    return ms_deform_attn(value, spatial_shapes, sampling, attention_weights)


def key_aware_deform_attn(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
) -> Tensor:
    """Key-aware deformable attention; see :func:`mmlite.ops.key_aware_deform_attn`.

    ``key`` is ``None`` where the value serves as its own key, so that it is sampled once.
    """
    dtype = query.dtype
    query = compute_dtype(query)
    sampled_value = sample(value, spatial_shapes, sampling_locations)
    sampled_key = sampled_value if key is None else sample(key, spatial_shapes, sampling_locations)
    scale = query.shape[-1] ** -0.5
    logits = (query.unsqueeze(-2) * sampled_key).sum(-1) * scale
    weights = logits.softmax(-1)
    output = (weights.unsqueeze(-1) * sampled_value).sum(-2)
    return output.flatten(2).to(dtype)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention; see :func:`mmlite.ops.ms_deform_attn`."""
    sampled_value = sample(value, spatial_shapes, sampling_locations)
    weights = compute_dtype(attention_weights).flatten(-2).unsqueeze(-1)
    return (weights * sampled_value).sum(-2).flatten(2).to(value.dtype)


def sampling_locations(
    reference_points: Tensor,
    sampling_offsets: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
) -> Tensor:
    """Offsets around the reference points (Deformable DETR, section 4.1 and appendix A.4).

    Args:
        reference_points (Tensor): Normalised (x, y), or (cx, cy, w, h) of boxes, shape
            (B or 1, Q, L, 2 or 4). Offsets from a box count in halves of its size over P.
        sampling_offsets (Tensor): In pixels of each level, shape (B, Q, M, L, P, 2); L may be 1:
            then one set of offsets serves every level.
        spatial_shapes (Sequence[tuple[int, int]]): (h, w) of every level, L pairs of ints.

    Returns:
        Tensor: Normalised (x, y), dtype of ``reference_points``, shape (B, Q, M, L, P, 2).
    """
    levels, points = len(spatial_shapes), sampling_offsets.shape[4]
    centre = reference_points
    if reference_points.shape[-1] == 2:
        unit = pixel_sizes(spatial_shapes, reference_points)  # (L, 2)
    else:
        centre = reference_points.narrow(-1, 0, 2)
        unit = reference_points.narrow(-1, 2, 2) * (0.5 / points)  # (B or 1, Q, L, 2)
    # The last three dimensions are kept flat here: elementwise products over a trailing
    # dimension of 2 are several times slower on the CPU, and some runtimes take five at most.
    offsets = sampling_offsets.to(reference_points.dtype).flatten(3)
    if sampling_offsets.shape[3] != levels:
        offsets = offsets.repeat(1, 1, 1, levels)
    unit = _repeat_points(unit, points)
    locations = torch.addcmul(
        _repeat_points(centre, points).unsqueeze(-2),
        offsets,
        unit if unit.dim() == 1 else unit.unsqueeze(-2),
    )
    return locations.unflatten(-1, (levels, points, 2))


def pixel_sizes(spatial_shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Normalised (width, height) of a pixel of every level, shape (L, 2)."""
    sides = [
        like.new_full((1,), 1.0 / side)
        for height, width in spatial_shapes
        for side in (width, height)
    ]
    return torch.cat(sides).unflatten(0, (-1, 2))


def _repeat_points(per_level: Tensor, points: int) -> Tensor:
    """(..., L, 2) -> (..., L * P * 2)."""
    return per_level.unsqueeze(-2).expand(*per_level.shape[:-1], points, 2).flatten(-3)


def sample(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor
) -> Tensor:
    """Sample every head's feature maps bilinearly at its own points.

    A location (x, y) in [0, 1] spans the whole map, pixel centres at half-integers
    (``align_corners=False``). Outside the map the features are zero. A location that is not a
    finite number counts as outside.

    Args:
        value (Tensor): Flattened feature pyramid, shape (B, S, M, D).
        spatial_shapes (Sequence[tuple[int, int]]): (h, w) of every level, L pairs of ints.
        sampling_locations (Tensor): shape (B, Q, M, L, P, 2).

    Returns:
        Tensor: float32 (float64 for float64 input), shape (B, Q, M, L*P, D).
    """
    batch, _, heads, dim = value.shape
    queries, levels, points = (sampling_locations.shape[i] for i in (1, 3, 4))
    # (-2, 3) lies outside a map of any size, so clamping changes neither samples nor gradients;
    # it keeps the pixel coordinates of wild locations within the range of integers.
    locations = compute_dtype(sampling_locations)
    locations = locations.nan_to_num(nan=-2.0, posinf=3.0, neginf=-2.0).clamp(-2.0, 3.0)
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B*M, Q, P, 2)
    maps = compute_dtype(value).permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, D, S)

    sampled = []
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        level_map = maps.narrow(-1, start, height * width).unflatten(-1, (height, width))
        start += height * width
        sampled.append(
            F.grid_sample(
                level_map,
                grids.select(0, level).to(maps.dtype),
                mode='bilinear',
                padding_mode='zeros',
                align_corners=False,
            )
        )
    samples = torch.stack(sampled, dim=-2)  # (B*M, D, Q, L, P)
    samples = samples.reshape(batch, heads, dim, queries, levels * points)
    return samples.permute(0, 3, 1, 4, 2)


def compute_dtype(tensor: Tensor) -> Tensor:
    """In float32 or float64, which every sum is computed in."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
