"""``mmlite visualize``: what a detector attends to, and what it detects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path

import click

from . import shared
from .shared import count_option, option

IMAGE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(context_settings=shared.HELP)
def visualize() -> None:
    """Draw sampling points, detections, and how attention is spread over the levels.

    A CONFIG is a path, mmdet::folder/config.py or mmlite::folder/config.py. Without a checkpoint
    the weights are random. Every command writes a PNG and a page beside it.

    \b
    Example:
      mmlite visualize attention lite.py lite.pth photo.jpg --against stock.py,stock.pth
      mmlite visualize detections lite.py lite.pth photo.jpg --annotations val.json
      mmlite visualize levels lite.py lite.pth val/
    """


def command(function: Callable) -> click.Command:
    """A subcommand that draws a detector, and others for comparison, on a device.

    The function gets ``detectors``, what iterates over their models, names and ways to run on an
    image's file. It returns a figure and its caption.
    """
    help = 'PNG file to write; the page gets the same name.'

    @visualize.command()
    @click.argument('model', nargs=-1, required=True, metavar='CONFIG [CHECKPOINT]')
    @option('--against', multiple=True, metavar='CONFIG[,CHECKPOINT]', help='Another detector.')
    @shared.cfg_options
    @shared.device_option
    @shared.out_option(help, '.png', default=f'{function.__name__}.png')
    @wraps(function)
    def run(model, against, cfg_options, device, out, **own) -> None:
        if len(model) > 2:
            raise ValueError('give one CONFIG and at most one CHECKPOINT')
        detectors = _detectors([','.join(model), *against], cfg_options, device)
        figure, caption = function(detectors=detectors, **own)
        from ..analysis.report import render

        figure.savefig(out, format='png')
        page = out.with_suffix('.html')
        page.write_text(render(title=caption, picture=out))
        click.echo(f'{out} and {page} written')

    return run


def _detectors(references: Sequence[str], changes: dict, device: str) -> Iterator[tuple]:
    """For each detector: model, name, and a function that runs it on an image's file."""
    from mmdet.apis import inference_detector

    from ..openmmlab.build import DetectorSpec, build_detector
    from ..openmmlab.families import reads_text

    for spec in map(DetectorSpec.parse, references):
        model = build_detector(shared.read_config(spec.config, changes), spec.checkpoint, device)
        if hasattr(model, 'decode_head'):
            raise ValueError('MMSegmentation reads images in its own way, which is not served here')
        name = spec.name if spec.checkpoint else f'{spec.name} (random weights)'
        # A detector that reads a text is asked for the classes of its data.
        text = {'text_prompt': model.dataset_meta['classes'], 'custom_entities': True}
        text = text if reads_text(model) else {}
        yield model, name, partial(inference_detector, model, **text)


def place(text: str) -> tuple[float, float]:
    """A place in an image, written 320,240."""
    try:
        x, y = map(float, text.split(','))
    except ValueError:
        raise click.BadParameter('write x,y in pixels, for example 320,240') from None
    return x, y


@command
@click.argument('image', type=IMAGE)
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
        run = partial(run, str(image))
        if rank is None:
            seen = attention_at_point(model, run, point, layer, level)
        else:
            seen = attention_of_object(model, run, rank, layer)
        rows.append((name, seen))
    names = ', '.join(name for name, _ in rows)
    return draw_attention(pixels, rows), f'Sampling points of {names} on {image.name}'


@command
@click.argument('image', type=IMAGE)
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
        found = run(str(image)).pred_instances
        drawn = draw_objects(pixels, found[found.scores >= score], model.dataset_meta['classes'])
        panels.append((f'{name}, score at least {score:g}', drawn))
    return draw_panels([panels]), f'Detections on {image.name}'


@command
@click.argument('images', type=FOLDER)
@count_option('--max-images', default=50)
@shared.json_option
def levels(detectors, images, max_images, json_path):
    """Draw how the encoder's attention spreads over the levels, for a folder of images.

    IMAGES is a folder. Rows are the levels of the queries, columns those of the sampled points;
    grey where a layer of a Lite encoder does not update the level.

    \b
    Example:
      mmlite visualize levels lite.py lite.pth val/ --max-images 200 --json levels.json
    """
    import numpy as np
    import torch

    from ..analysis.attention import level_masses
    from ..analysis.pictures import draw_level_masses

    paths = shared.image_files([images])[:max_images]
    masses = {}
    with shared.progress() as start:
        for model, name, run in detectors:
            step, seen = start(name, len(paths)), []
            for path in paths:
                seen.append(level_masses(model, partial(run, str(path))))
                step()
            masses[name] = torch.stack(seen).mean(0)
    plain = {name: mass.double().numpy().round(4) for name, mass in masses.items()}
    # null for what a layer does not update
    plain = {name: np.where(np.isnan(mass), None, mass).tolist() for name, mass in plain.items()}
    shared.write_json(json_path, {'images': len(paths), 'masses': plain})
    caption = f'Attention of the encoder by level, mean over {len(paths)} images of {images.name}'
    return draw_level_masses(masses), caption
