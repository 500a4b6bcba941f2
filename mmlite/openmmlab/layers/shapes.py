"""Level sizes as Python ints, where MMDetection hands them on as a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def level_sizes(spatial_shapes: Tensor | Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The (h, w) of every level as Python ints.

    Reading a tensor on a GPU waits for the device. So it happens once for a tensor, which many
    layers are given, and not at all where the detector has remembered the sizes of its feature
    maps with :func:`remember_level_sizes`.

    Args:
        spatial_shapes (Tensor | Sequence[tuple[int, int]]): shape (num_levels, 2).

    Returns:
        tuple[tuple[int, int], ...]: One pair a level.
    """
    if not isinstance(spatial_shapes, Tensor):
        return tuple(spatial_shapes)
    known = getattr(spatial_shapes, '_level_sizes', None)
    if known is None:
        known = tuple((height, width) for height, width in spatial_shapes.tolist())
        remember_level_sizes(spatial_shapes, known)
    return known


def remember_level_sizes(spatial_shapes: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    """Tell :func:`level_sizes` what a tensor holds, so that it need not be read.

    Args:
        spatial_shapes (Tensor): shape (num_levels, 2); must not be written to afterwards.
        sizes (Sequence[tuple[int, int]]): The same as Python ints.
    """
    if torch.jit.is_tracing():  # where sizes are tensors, which no operator takes
        sizes = [(int(height), int(width)) for height, width in sizes]
    spatial_shapes._level_sizes = tuple(sizes)
