"""From offsets and reference points to sampling locations, where no kernel does it itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference


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
    sizes = list(zip(spatial_shapes[::2], spatial_shapes[1::2]))
    return reference.sampling_locations(points, sampling_offsets, sizes)
