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
    """Level sizes (h, w) of an image's pyramid, largest map first."""
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
    image_size: tuple[int, int],
    batch_size: int = 1,
    num_queries: int | None = None,
    num_heads: int = 8,
    head_dim: int = 32,
    num_points: int = 4,
    locations: str = 'grid',
    *,
    dtype: torch.dtype = torch.float32,
    device: str = 'cpu',
    seed: int = 0,
) -> OperatorInputs:
    """What an encoder layer over the pyramid of an image of (h, w) hands to the operators.

    The points of a head on a level lie as in a model at its start: around the query's own place,
    along the directions of the initial offsets, with a pixel of noise; with ``locations``
    ``'uniform'`` anywhere, the worst case for caches. ``num_queries`` tokens, drawn at random, ask;
    by default all. ValueError for more queries than tokens. ``dtype`` is that of query, value and
    weights.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = pyramid_sizes(image_size)
    tokens = sum(h * w for h, w in sizes)
    queries = num_queries or tokens
    if queries > tokens:
        raise ValueError(f'queries must be at most {tokens}, all tokens; got {queries}')
    shapes = torch.tensor(sizes, dtype=torch.int64)
    size = (batch_size, queries, num_heads, len(sizes), num_points)
    chosen = torch.randperm(tokens, generator=generator)[:queries].sort().values
    centres = encoder_reference_points(sizes)[:, chosen, None, :, None]
    pixels = directional_grid(num_heads, num_points)[:, None]  # (M, 1, P, 2)
    pixels = pixels + torch.randn(*size, 2, generator=generator)
    points = centres + pixels / shapes.flip(-1)[:, None]
    if locations == 'uniform':
        points = torch.rand(points.shape, generator=generator)
    query = torch.randn(batch_size, queries, num_heads, head_dim, generator=generator)
    value = torch.randn(batch_size, tokens, num_heads, head_dim, generator=generator)
    weights = torch.randn(size, generator=generator).flatten(-2).softmax(-1).reshape(size)
    query, value, weights = (tensor.to(device, dtype) for tensor in (query, value, weights))
    return OperatorInputs(query, value, sizes, shapes.to(device), points.to(device), weights)


def encoder_inputs(
    sizes: Sequence[tuple[int, int]],
    embed_dims: int = 256,
    batch_size: int = 1,
) -> dict[str, Tensor | None]:
    """Keyword arguments of mmdet's ``DeformableDetrTransformerEncoder.forward``, nothing padded.

    Levels have the given (h, w); features, (batch, tokens, embed_dims), are of unit scale.
    """
    shapes = torch.tensor(sizes, dtype=torch.int64)
    tokens = shapes.prod(-1)
    generator = torch.Generator().manual_seed(0)
    query, pos = torch.randn(2, batch_size, int(tokens.sum()), embed_dims, generator=generator)
    return {
        'query': query,
        'query_pos': pos,
        'key_padding_mask': None,
        'spatial_shapes': shapes,
        'level_start_index': tokens.cumsum(0) - tokens,
        'valid_ratios': torch.ones(batch_size, len(sizes), 2),
    }


def image_batch(
    batch_size: int, image_size: tuple[int, int], device: torch.device | str = 'cpu'
) -> tuple[Tensor, list[DetDataSample]]:
    """Normalised images, (batch, 3, height, width), as a detector of mmdet takes them.

    Each has 7 random boxes, COCO's average, of the first class, with masks in them, and asks for
    COCO's classes as its text.
    """
    # Here, so that the operators can be measured where only torch is installed.
    from mmdet.datasets import CocoDataset
    from mmdet.testing import demo_mm_inputs

    texts = [CocoDataset.METAINFO['classes']] * batch_size
    options = {'num_items': [7] * batch_size, 'num_classes': 2, 'with_mask': True}
    options |= {'texts': texts, 'custom_entities': True}
    drawn = demo_mm_inputs(batch_size, (3, *image_size), **options)
    for sample in drawn['data_samples']:
        size = dict.fromkeys(('batch_input_shape', 'pad_shape'), image_size)
        sample.set_metainfo({**size, 'scale_factor': (1.0, 1.0)})
        sample.gt_instances.labels.zero_()  # every detector has a first class
    images = (torch.stack(drawn['inputs']).float() - 127) / 74
    return images.to(device), [sample.to(device) for sample in drawn['data_samples']]
