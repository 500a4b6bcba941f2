"""Made-up inputs in the shapes that detectors, encoders and operators see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..nn import directional_grid, encoder_reference_points

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample

STRIDES = (8, 16, 32, 64)


def pyramid_sizes(
    image_size: tuple[int, int], strides: Sequence[int] = STRIDES
) -> list[tuple[int, int]]:
    """(h, w) of every level of the pyramid of an image, (height, width), largest map first."""
    height, width = image_size
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


class OperatorInputs(NamedTuple):
    """Arguments of the two operators."""

    query: Tensor  # (B, Q, M, D)
    value: Tensor  # (B, S, M, D)
    level_sizes: Sequence[tuple[int, int]]  # (h, w) of every level
    spatial_shapes: Tensor  # the same for mmcv's operator, int64, (L, 2)
    sampling_locations: Tensor  # float32, (B, Q, M, L, P, 2)
    attention_weights: Tensor  # sum to 1 over levels and points, (B, Q, M, L, P)


def operator_inputs(
    sizes: Sequence[tuple[int, int]],
    *,
    batch_size: int = 1,
    num_queries: int | None = None,
    num_heads: int = 8,
    head_dim: int = 32,
    num_points: int = 4,
    locations: str = 'grid',
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = 'cpu',
    seed: int = 0,
) -> OperatorInputs:
    """What an encoder layer over levels of these (h, w) hands to the operators.

    Args:
        num_queries (int, optional): A random choice of so many tokens asks; by default all.
        locations (str): ``'grid'``: around the query's own place, along the directions of the
            initial offsets, with a pixel of noise, as in a model. ``'uniform'``: anywhere, which
            is the worst case for caches.
        dtype (torch.dtype): Of query, value and weights.

    Returns:
        OperatorInputs: Leaf tensors that do not require gradients.

    Raises:
        ValueError: More queries than tokens, or an unknown kind of locations.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(sizes, dtype=torch.int64)
    tokens = int(shapes.prod(-1).sum())
    num_queries = tokens if num_queries is None else num_queries
    if not 1 <= num_queries <= tokens:
        raise ValueError(f'queries must be between 1 and {tokens}, all tokens; got {num_queries}')
    size = (batch_size, num_queries, num_heads, len(sizes), num_points)
    if locations == 'uniform':
        points = torch.rand(*size, 2, generator=generator)
    elif locations == 'grid':
        chosen = torch.randperm(tokens, generator=generator)[:num_queries].sort().values
        centres = encoder_reference_points(sizes)[:, chosen, None, :, None]
        pixels = directional_grid(num_heads, num_points)[:, None]  # (M, 1, P, 2)
        pixels = pixels + torch.randn(*size, 2, generator=generator)
        points = centres + pixels / shapes.flip(-1)[:, None]
    else:
        raise ValueError(f"locations must be 'grid' or 'uniform'; got {locations!r}")
    query = torch.randn(batch_size, num_queries, num_heads, head_dim, generator=generator)
    value = torch.randn(batch_size, tokens, num_heads, head_dim, generator=generator)
    weights = torch.randn(size, generator=generator).flatten(-2).softmax(-1).reshape(size)
    return OperatorInputs(
        query.to(device, dtype),
        value.to(device, dtype),
        sizes,
        shapes.to(device),
        points.to(device),
        weights.to(device, dtype),
    )


def encoder_inputs(
    sizes: Sequence[tuple[int, int]],
    embed_dims: int = 256,
    batch_size: int = 1,
    device: torch.device | str = 'cpu',
) -> dict[str, Tensor | None]:
    """Keyword arguments of mmdet's ``DeformableDetrTransformerEncoder.forward``, nothing padded.

    Levels have the given (h, w); features, (batch, tokens, embed_dims), are of unit scale.
    """
    shapes = torch.tensor(sizes, dtype=torch.int64)
    tokens = shapes.prod(-1)
    generator = torch.Generator().manual_seed(0)
    query, pos = torch.randn(2, batch_size, int(tokens.sum()), embed_dims, generator=generator)
    return {
        'query': query.to(device),
        'query_pos': pos.to(device),
        'key_padding_mask': None,
        'spatial_shapes': shapes.to(device),
        'level_start_index': (tokens.cumsum(0) - tokens).to(device),
        'valid_ratios': torch.ones(batch_size, len(sizes), 2, device=device),
    }


def image_batch(
    batch_size: int,
    image_size: tuple[int, int],
    num_classes: int = 80,
    device: torch.device | str = 'cpu',
) -> tuple[Tensor, list[DetDataSample]]:
    """Normalised images with random boxes and masks, as a detector of mmdet takes them.

    Images are of unit scale, (batch, 3, height, width). Each has 7 boxes, COCO's average, with
    masks in them and labels below ``num_classes``, and asks for COCO's classes as its text.
    """
    # Here, so that the operators can be measured where only torch is installed.
    from mmdet.datasets import CocoDataset
    from mmdet.testing import demo_mm_inputs

    drawn = demo_mm_inputs(
        batch_size,
        (3, *image_size),
        num_items=[7] * batch_size,
        num_classes=num_classes,
        with_mask=True,
        texts=[CocoDataset.METAINFO['classes']] * batch_size,
        custom_entities=True,
    )
    for sample in drawn['data_samples']:
        size = dict.fromkeys(('batch_input_shape', 'pad_shape'), image_size)
        sample.set_metainfo({**size, 'scale_factor': (1.0, 1.0)})
    images = (torch.stack(drawn['inputs']).float() - 127) / 74
    return images.to(device), [sample.to(device) for sample in drawn['data_samples']]
