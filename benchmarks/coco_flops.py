"""FLOPs of stock and Lite encoders over the first images of COCO val2017.

    python -m benchmarks.coco_flops instances_val2017.json

The file may be any of COCO's annotations of val2017: their sizes alone are read. DETR's benchmark,
which the papers follow, takes the 100 images with the lowest numbers. Images are scaled to 800
pixels on their shorter side, or 1333 on the longer one, and not padded.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from pathlib import Path

import click
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder

from mmlite.analysis.complexity import count_flops
from mmlite.openmmlab.layers import LiteEncoder

STRIDES = (8, 16, 32, 64)
ENCODERS = {
    'stock': DeformableDetrTransformerEncoder,
    'H3L1-(2+1)x3': LiteEncoder,
    'H3L1-(6+1)x1': LiteEncoder,
    'H2L2-(2+1)x3': LiteEncoder,
}


def scaled(height: int, width: int) -> tuple[int, int]:
    """The size that an image is scaled to, as MMDetection's ``Resize`` does it."""
    factor = min(800 / min(height, width), 1333 / max(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def encoder_flops(encoder: torch.nn.Module, levels: list[tuple[int, int]]) -> int:
    """FLOPs of an encoder over maps of these sizes."""
    tokens = torch.zeros(1, sum(height * width for height, width in levels), 256)
    shapes = torch.tensor(levels)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    return count_flops(
        encoder,
        query=tokens,
        query_pos=torch.zeros_like(tokens),
        key_padding_mask=torch.zeros(tokens.shape[:2], dtype=torch.bool),
        spatial_shapes=shapes,
        level_start_index=starts,
        valid_ratios=torch.ones(1, len(levels), 2),
    ).total


def flops_per_token(encoder: torch.nn.Module) -> list[float]:
    """What a token of each map costs; an encoder's FLOPs are their sum over all tokens."""
    maps = [(16, 16), (8, 8), (4, 4), (2, 2)]
    wider = [[(h, w + (i == level)) for i, (h, w) in enumerate(maps)] for level in range(len(maps))]
    without = encoder_flops(encoder, maps)
    return [(encoder_flops(encoder, each) - without) / h for each, (h, _) in zip(wider, maps)]


@click.command()
@click.argument('annotations', type=click.Path(exists=True, path_type=Path))
@click.option('--images', type=click.IntRange(1), default=100, help='So many of the first.')
def main(annotations: Path, images: int) -> None:
    """Count the encoders' FLOPs over the images of ANNOTATIONS with the lowest numbers."""
    entries = sorted(json.loads(annotations.read_text())['images'], key=lambda one: one['id'])
    sizes = Counter(scaled(one['height'], one['width']) for one in entries[:images])
    layer = {
        'self_attn_cfg': {'embed_dims': 256, 'num_levels': 4, 'batch_first': True},
        'ffn_cfg': {'embed_dims': 256, 'feedforward_channels': 2048},
    }
    tokens = [0.0] * len(STRIDES)  # of each map, in the mean
    for size, times in sizes.items():
        for level, stride in enumerate(STRIDES):
            height, width = (-(-side // stride) for side in size)
            tokens[level] += height * width * times / sum(sizes.values())
    click.echo(f'{sum(sizes.values())} images, {sum(tokens):.0f} tokens in the mean')
    for name, kind in ENCODERS.items():
        schedule = {} if name == 'stock' else {'schedule': name}
        encoder = kind(num_layers=6, layer_cfg=layer, **schedule).eval()
        mean = sum(map(operator.mul, flops_per_token(encoder), tokens))
        click.echo(f'{name}: {mean / 1e9:.2f} GFLOPs')


if __name__ == '__main__':
    main()
