"""``mmlite visualize``: what a detector attends to, and what it detects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path

import click

from . import shared
from .shared import option

IMAGE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(context_settings=shared.HELP)
def visualize() -> None:
    """Draw sampling points, or detections beside the ground truth.

    A CONFIG is a path, mmdet::folder/config.py or mmlite::folder/config.py. Without a checkpoint
    the weights are random. Every command writes a PNG and a page beside it.

    \b
    Example:
      mmlite visualize attention lite.py lite.pth photo.jpg --against stock.py,stock.pth
      mmlite visualize detections lite.py lite.pth photo.jpg --annotations val.json
    """


def command(function: Callable) -> click.Command:
    """A subcommand that draws what a detector, and others for comparison, do with an image.

    The function gets the ``image`` and ``detectors``, what iterates over their models, names and
    ways to run on it. It returns a figure and its caption.
    """
    help = 'PNG file to write; the page gets the same name.'

    @visualize.command()
    @click.argument('model', nargs=-1, required=True, metavar='CONFIG [CHECKPOINT]')
    @click.argument('image', type=IMAGE)
    @option('--against', multiple=True, metavar='CONFIG[,CHECKPOINT]', help='Another detector.')
    @shared.cfg_options
    @shared.device_option
    @shared.out_option(help, '.png', default=f'{function.__name__}.png')
    @wraps(function)
    def run(model, image, against, cfg_options, device, out, **own) -> None:
        if len(model) > 2:
            raise ValueError('give one CONFIG and at most one CHECKPOINT')
        detectors = _detectors([','.join(model), *against], cfg_options, device, image)
        figure, caption = function(detectors=detectors, image=image, **own)
        from ..analysis.report import render

        figure.savefig(out, format='png')
        page = out.with_suffix('.html')
        page.write_text(render(title=caption, picture=out))
        click.echo(f'{out} and {page} written')

    return run


def _detectors(references: Sequence[str], changes: dict, device: str, image: Path) -> Iterator:
    """For each detector: model, name, and a function that runs it on the image."""
    from mmdet.apis import inference_detector

    from ..analysis.attention import deformable_attentions
    from ..analysis.complexity import find_encoder
    from ..openmmlab.build import DetectorSpec, build_detector
    from ..openmmlab.families import reads_text

    for spec in map(DetectorSpec.parse, references):
        model = build_detector(shared.read_config(spec.config, changes), spec.checkpoint, device)
        if hasattr(model, 'decode_head'):
            raise ValueError('MMSegmentation reads images in its own way, which is not served here')
        encoder = find_encoder(model)
        if not any(name.startswith(f'{encoder}.') for name in deformable_attentions(model)):
            raise ValueError(
                f'{type(model).__name__} has no encoder with deformable attention to look into'
            )
        name = spec.name if spec.checkpoint else f'{spec.name} (random weights)'
        # A detector that reads a text is asked for the classes of its data.
        text = {'text_prompt': model.dataset_meta['classes'], 'custom_entities': True}
        text = text if reads_text(model) else {}
        yield model, name, partial(inference_detector, model, str(image), **text)


def place(text: str) -> tuple[float, float]:
    """A place in an image, written 320,240."""
    try:
        x, y = map(float, text.split(','))
    except ValueError:
        raise click.BadParameter('write x,y in pixels, for example 320,240') from None
    return x, y


@command
@click.option('--point', type=place, metavar='X,Y', help='Query: a place. Default: the centre.')
@click.option('--object', 'rank', type=click.IntRange(0), help='Query: a detection, 0 the surest.')
@option('--layer', type=int, default=-1, help='Negative from the last.')
@click.option('--level', type=int, help='Of the token at the point, 0 the largest map.')
def attention(detectors, image, point, rank, layer, level):
    """Draw where a query samples on every level, coloured by attention weight.

    The query is the encoder's token at a point, or the decoder's query of a detected object.

    \b
    Example:
      mmlite visualize attention lite.py lite.pth photo.jpg --point 320,240 --layer 1
      mmlite visualize attention lite.py lite.pth photo.jpg --object 0
    """
    from ..analysis.attention import attention_at_point, attention_of_object
    from ..analysis.pictures import draw_attention
    from ..export import read_image

    if point is not None and rank is not None:
        raise ValueError('give a --point or an --object, not both')
    pixels = read_image(image)[..., ::-1]
    point = point or (pixels.shape[1] / 2, pixels.shape[0] / 2)
    rows = []
    for model, name, run in detectors:
        if rank is None:
            seen = attention_at_point(model, run, point, layer, level)
        else:
            seen = attention_of_object(model, run, rank, layer)
        rows.append((name, seen))
    names = ', '.join(name for name, _ in rows)
    return draw_attention(pixels, rows), f'Sampling points of {names} on {image.name}'


@command
@shared.file_option('--annotations', help='COCO annotations, to draw what is there, too.')
@option('--score', type=click.FloatRange(0, 1), default=0.3)
def detections(detectors, image, annotations, score):
    """Draw what is detected, beside the ground truth.

    \b
    Example:
      mmlite visualize detections lite.py lite.pth val/1.jpg --annotations val.json --score 0.5
    """
    from ..analysis.accuracy import Dataset
    from ..analysis.pictures import draw_objects, draw_panels
    from ..export import read_image

    pixels, panels = read_image(image), []
    if annotations is not None:
        truth = Dataset(annotations, image.parent).objects(image.name)
        panels.append(('ground truth', draw_objects(pixels, *truth)))
    for model, name, run in detectors:
        found = run().pred_instances
        drawn = draw_objects(pixels, found[found.scores >= score], model.dataset_meta['classes'])
        panels.append((f'{name}, score at least {score:g}', drawn))
    return draw_panels([panels]), f'Detections on {image.name}'
