"""Made-up inputs in the shapes that detectors, encoders and operators see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class OperatorShape:
    """What an encoder layer over the pyramid of an image hands to the operators."""

    image_size: tuple[int, int] = (800, 1333)  # height and width in pixels; strides are 8 to 64
    batch_size: int = 1  # B
    num_queries: int | None = None  # so many tokens, drawn at random, ask; by default all
    num_heads: int = 8  # M
    head_dim: int = 32  # D
    num_points: int = 4  # of a head on a level, P
    # 'grid': around the query's own place, along the directions of the initial offsets, with a
    # pixel of noise; 'uniform': anywhere, the worst case for caches.
    locations: str = 'grid'
    dtype: torch.dtype = torch.float32  # of query, value and weights
    device: str = 'cpu'

    @property
    def num_tokens(self) -> int:
        return sum(h * w for h, w in pyramid_sizes(self.image_size))

    def inputs(self, seed: int = 0) -> OperatorInputs:
        """Draw the inputs; ValueError for more queries than tokens or unknown locations."""
        generator = torch.Generator().manual_seed(seed)
        sizes, tokens = pyramid_sizes(self.image_size), self.num_tokens
        queries = self.num_queries or tokens
        if queries > tokens:
            raise ValueError(f'queries must be at most {tokens}, all tokens; got {queries}')
        shapes = torch.tensor(sizes, dtype=torch.int64)
        size = (self.batch_size, queries, self.num_heads, len(sizes), self.num_points)
        if self.locations == 'uniform':
            points = torch.rand(*size, 2, generator=generator)
        elif self.locations == 'grid':
            chosen = torch.randperm(tokens, generator=generator)[:queries].sort().values
            centres = encoder_reference_points(sizes)[:, chosen, None, :, None]
            pixels = directional_grid(self.num_heads, self.num_points)[:, None]  # (M, 1, P, 2)
            pixels = pixels + torch.randn(*size, 2, generator=generator)
            points = centres + pixels / shapes.flip(-1)[:, None]
        else:
            raise ValueError(f"locations must be 'grid' or 'uniform'; got {self.locations!r}")
        heads = (self.num_heads, self.head_dim)
        query = torch.randn(self.batch_size, queries, *heads, generator=generator)
        value = torch.randn(self.batch_size, tokens, *heads, generator=generator)
        weights = torch.randn(size, generator=generator).flatten(-2).softmax(-1).reshape(size)
        query, value, weights = (t.to(self.device, self.dtype) for t in (query, value, weights))
        shapes, points = shapes.to(self.device), points.to(self.device)
        return OperatorInputs(query, value, sizes, shapes, points, weights)


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
