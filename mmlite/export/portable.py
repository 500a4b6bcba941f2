"""Deformable attention in operators that every runtime has: what the portable form is made of.

The sums of :mod:`mmlite.ops.reference` in another order. There the samples of all levels are put
together and turned so that each query's lie side by side, which a runtime does in three copies of
the largest tensor of all. Here every level stays as ``grid_sample`` leaves it, points before
queries, so that whole rows of queries are multiplied and added at a time. Locations are clamped,
but one that is not a number is not caught.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """See :func:`mmlite.ops.ms_deform_attn`; ``spatial_shapes`` is flat: h0, w0, h1, w1, ..."""
    samples = _samples(value, spatial_shapes, sampling_locations)
    weights = attention_weights.permute(3, 0, 2, 4, 1).flatten(1, 2)  # (L, B*M, P, Q)
    return _weighted_sum(samples, list(weights.unbind(0)), value)


def key_aware_deform_attn(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
) -> Tensor:
    """See :func:`mmlite.ops.key_aware_deform_attn`; without ``key`` the value is its own."""
    samples = _samples(value, spatial_shapes, sampling_locations)
    keys = samples if key is None else _samples(key, spatial_shapes, sampling_locations)
    query = query.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(2)  # (B*M, D, 1, Q)
    query = query * query.shape[1] ** -0.5
    logits = torch.cat([(query * level).sum(1) for level in keys], 1)  # (B*M, L*P, Q)
    weights = logits.softmax(1).split(sampling_locations.shape[4], 1)
    return _weighted_sum(samples, weights, value)


def _samples(value: Tensor, sizes: Sequence[int], locations: Tensor) -> list[Tensor]:
    """What each level has at the points, zero outside: (B*M, D, P, Q)."""
    grids = (2 * locations.clamp(-2.0, 3.0) - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, D, S)
    samples, start = [], 0
    for grid, height, width in zip(grids.unbind(0), sizes[::2], sizes[1::2]):
        level = maps.narrow(-1, start, height * width).unflatten(-1, (height, width))
        start += height * width
        samples.append(F.grid_sample(level, grid, align_corners=False))
    return samples


def _weighted_sum(samples: Sequence[Tensor], weights: Sequence[Tensor], value: Tensor) -> Tensor:
    """Samples of each level times weights (B*M, P, Q), added up: (B, Q, M*D)."""
    terms = [(level * weight.unsqueeze(1)).sum(2) for level, weight in zip(samples, weights)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    batch, _, heads, _ = value.shape
    return total.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)
