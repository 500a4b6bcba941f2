"""Where queries lie: reference points.

Level sizes are Python ints throughout, and every constant is made on its device: nothing is
copied from the host and nothing is read back. Tensors are cut by methods rather than by indexing,
which asks for the device even of fake tensors and so could not be tried without one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LevelSizes = Sequence[tuple[int, int]]


def encoder_reference_points(
    level_sizes: LevelSizes,
    valid_ratios: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Centre of every token on every level (Deformable DETR, section 4.1).

    Args:
        level_sizes (Sequence[tuple[int, int]]): (h, w) of every level.
        valid_ratios (Tensor, optional): Valid part (w, h) of each level of each image, shape
            (bs, num_levels, 2). None where no image is padded.
        device (torch.device | str, optional): Where the points are wanted; that of
            ``valid_ratios`` where these are given.

    Returns:
        Tensor: Normalised (x, y), float32, shape (bs, num_tokens, num_levels, 2); bs is 1 without
        ``valid_ratios``.
    """
    if valid_ratios is not None:
        device = valid_ratios.device
    maps: list[Tensor] = []
    for level, (height, width) in enumerate(level_sizes):
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        y, x = y.unsqueeze(1).expand(-1, width), x.expand(height, -1)
        centres = torch.stack([x, y], -1).flatten(0, 1).unsqueeze(0)  # (1, h * w, 2)
        if valid_ratios is not None:
            centres = centres / valid_ratios.narrow(1, level, 1)
        maps.append(centres)
    points = torch.cat(maps, 1).unsqueeze(2)
    if valid_ratios is None:
        return points.expand(-1, -1, len(level_sizes), -1)
    return points * valid_ratios.unsqueeze(1)
