"""FLOPs of stock and Lite encoders over the first images of COCO val2017.

    python -m benchmarks.coco_flops instances_val2017.json

The file may be any of COCO's annotations of val2017: their sizes alone are read. DETR's benchmark,
which the papers follow, takes the 100 images with the lowest numbers. Images are scaled to 800
pixels on their shorter side, or 1333 on the longer one, and not padded.
"""

from __future__ import annotations

import json
import operator
from pathlib import Path

import click
import torch
from mmcv.image import rescale_size
from mmdet.models.layers import DeformableDetrTransformerEncoder

from mmlite.analysis.complexity import count_flops
from mmlite.analysis.inputs import encoder_inputs, pyramid_sizes
from mmlite.openmmlab.layers import LiteEncoder

ENCODERS = {
    'stock': DeformableDetrTransformerEncoder,
    'H3L1-(2+1)x3': LiteEncoder,
    'H3L1-(6+1)x1': LiteEncoder,
    'H2L2-(2+1)x3': LiteEncoder,
}


def flops_per_token(encoder: torch.nn.Module) -> list[float]:
    """What a token of each map costs; an encoder's FLOPs are their sum over all tokens."""

    def count(maps: list[tuple[int, int]]) -> int:
        return count_flops(encoder, **encoder_inputs(maps)).total

    maps = [(16, 16), (8, 8), (4, 4), (2, 2)]
    wider = [[(h, w + (i == level)) for i, (h, w) in enumerate(maps)] for level in range(len(maps))]
    return [(count(each) - count(maps)) / h for each, (h, _) in zip(wider, maps)]


@click.command()
@click.argument('annotations', type=click.Path(exists=True, path_type=Path))
@click.option('--images', type=click.IntRange(1), default=100, help='So many of the first.')
def main(annotations: Path, images: int) -> None:
    """Count the encoders' FLOPs over the images of ANNOTATIONS with the lowest numbers."""
    entries = sorted(json.loads(annotations.read_text())['images'], key=lambda one: one['id'])
    layer = {
        'self_attn_cfg': {'embed_dims': 256, 'num_levels': 4, 'batch_first': True},
        'ffn_cfg': {'embed_dims': 256, 'feedforward_channels': 2048},
    }
    pyramids = [
        pyramid_sizes(rescale_size((one['width'], one['height']), (1333, 800))[::-1])
        for one in entries[:images]
    ]
    # Of each map, in the mean.
    tokens = [sum(h * w for h, w in maps) / len(pyramids) for maps in zip(*pyramids)]
    click.echo(f'{len(pyramids)} images, {sum(tokens):.0f} tokens in the mean')
    for name, kind in ENCODERS.items():
        schedule = {} if name == 'stock' else {'schedule': name}
        encoder = kind(num_layers=6, layer_cfg=layer, **schedule).eval()
        mean = sum(map(operator.mul, flops_per_token(encoder), tokens))
        click.echo(f'{name}: {mean / 1e9:.2f} GFLOPs')


if __name__ == '__main__':
    main()
