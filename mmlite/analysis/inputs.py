"""Made-up inputs in the shapes that detectors, encoders and operators see."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

STRIDES = (8, 16, 32, 64)


def level_sizes(
    image_size: tuple[int, int], strides: Sequence[int] = STRIDES
) -> list[tuple[int, int]]:
    """(h, w) of every level of the pyramid of an image, largest map first.

    Args:
        image_size (tuple[int, int]): Height and width in pixels.
        strides (Sequence[int]): Pixels between neighbouring tokens, one number a level.

    Returns:
        list[tuple[int, int]]: Each level halves the one before it, rounded up.
    """
    height, width = image_size
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


def encoder_inputs(
    sizes: Sequence[tuple[int, int]],
    embed_dims: int = 256,
    batch_size: int = 1,
    *,
    seed: int = 0,
    device: torch.device | str = 'cpu',
) -> dict[str, Tensor | None]:
    """Keyword arguments of mmdet's ``DeformableDetrTransformerEncoder.forward``, nothing padded.

    Args:
        sizes (Sequence[tuple[int, int]]): (h, w) of every level.
        embed_dims (int): Channels, C.
        batch_size (int): Images, B.
        seed (int): Seed of the random features.
        device (torch.device | str): Where the tensors live.

    Returns:
        dict[str, Tensor | None]: ``query`` and ``query_pos`` of shape (B, S, C) and unit scale,
        ``key_padding_mask`` None, and the level tables.
    """
    shapes = torch.tensor(sizes, dtype=torch.int64)
    tokens = shapes.prod(-1)
    generator = torch.Generator().manual_seed(seed)
    size = (batch_size, int(tokens.sum()), embed_dims)
    return {
        'query': torch.randn(size, generator=generator).to(device),
        'query_pos': torch.randn(size, generator=generator).to(device),
        'key_padding_mask': None,
        'spatial_shapes': shapes.to(device),
        'level_start_index': (tokens.cumsum(0) - tokens).to(device),
        'valid_ratios': torch.ones(batch_size, len(sizes), 2, device=device),
    }


def image_batch(
    batch_size: int,
    image_size: tuple[int, int],
    *,
    num_classes: int = 80,
    num_boxes: int = 7,
    seed: int = 0,
    device: torch.device | str = 'cpu',
) -> tuple[Tensor, list[DetDataSample]]:
    """Normalised images with random boxes, as a detector of mmdet takes them.

    Args:
        batch_size (int): Images, B.
        image_size (tuple[int, int]): Height and width in pixels.
        num_classes (int): Labels are drawn from 0 .. num_classes - 1.
        num_boxes (int): Ground-truth boxes of every image (COCO has 7 on average).
        seed (int): Seed of pixels, boxes and labels.
        device (torch.device | str): Where the tensors live.

    Returns:
        tuple[Tensor, list[DetDataSample]]: images (B, 3, H, W) of unit scale, and B samples.
    """
    height, width = image_size
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, height, width, generator=generator)
    scale = torch.tensor([width, height, width, height])
    samples = []
    for _ in range(batch_size):
        sizes = torch.rand(num_boxes, 2, generator=generator) * 0.4 + 0.05
        corners = torch.rand(num_boxes, 2, generator=generator) * (1 - sizes)
        boxes = torch.cat([corners, corners + sizes], dim=1) * scale
        labels = torch.randint(num_classes, (num_boxes,), generator=generator)
        sample = DetDataSample(
            metainfo={
                'img_shape': image_size,
                'ori_shape': image_size,
                'pad_shape': image_size,
                'batch_input_shape': image_size,
                'scale_factor': (1.0, 1.0),
            }
        )
        sample.gt_instances = InstanceData(bboxes=boxes.to(device), labels=labels.to(device))
        samples.append(sample)
    return images.to(device), samples
