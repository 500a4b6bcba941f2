"""``mmlite visualize``: what a detector attends to, and what it detects."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click

from .benchmark import check_device, progress

_IMAGES = ('.jpg', '.jpeg', '.png', '.bmp')


@click.group(context_settings={'help_option_names': ['-h', '--help']})
def visualize() -> None:
    """Draw sampling points, detections, and how attention is spread over the levels.

    A CONFIG is a path, mmdet::folder/config.py or mmlite::folder/config.py; its checkpoint follows
    after a comma. Every command writes a PNG and a page beside it.

    \b
    Example:
      mmlite visualize attention lite.py,lite.pth --against stock.py,stock.pth photo.jpg
      mmlite visualize detections lite.py,lite.pth photo.jpg --annotations val.json
      mmlite visualize levels lite.py,lite.pth val/
    """
    warnings.filterwarnings('ignore')  # those of the stack about itself


def _point(ctx, param, value):
    if value is None:
        return None
    try:
        x, y = map(float, value.split(','))
    except ValueError as error:
        raise click.BadParameter('write x,y in pixels, for example 320,240') from error
    return x, y


out_option = click.option(
    '--out',
    type=click.Path(dir_okay=False, path_type=Path),
    help='PNG file to write; the page gets the same name. Default: named after the command.',
)
device_option = click.option('--device', default='cpu', show_default=True)
image_argument = click.argument('image', type=click.Path(path_type=Path))


@visualize.command()
@click.argument('config')
@image_argument
@click.option('--against', multiple=True, metavar='CONFIG', help='A detector to draw below.')
@click.option(
    '--point', callback=_point, metavar='X,Y', help='Query: a place. Default: the centre.'
)
@click.option('--object', 'rank', type=click.IntRange(0), help='Query: a detection, 0 the surest.')
@click.option('--layer', type=int, default=-1, show_default=True, help='Negative from the last.')
@click.option('--level', type=int, help='Of the token at the point, 0 the largest map.')
@device_option
@out_option
def attention(config, image, against, point, rank, layer, level, device, out) -> None:
    """Draw where a query samples on every level, coloured by attention weight.

    The query is the encoder's token at a point, or the decoder's query of a detected object.

    \b
    Example:
      mmlite visualize attention lite.py,lite.pth photo.jpg --against stock.py,stock.pth
      mmlite visualize attention lite.py,lite.pth photo.jpg --point 320,240 --layer 1
      mmlite visualize attention lite.py,lite.pth photo.jpg --object 0
    """
    from ..analysis import pictures

    if point is not None and rank is not None:
        raise ValueError('give a --point or an --object, not both')
    check_device(device)
    pixels = _read(image)
    if point is None:
        point = (pixels.shape[1] / 2, pixels.shape[0] / 2)
    sights = []
    with progress() as start:
        references = (config, *against)
        step = start('looking', len(references))
        for reference in references:
            model, name = _detector(reference, device)
            run = pictures.run_on(model, str(image))
            if rank is None:
                sight = pictures.look_at_point(
                    model, run, point, name=name, layer=layer, level=level
                )
            else:
                sight = pictures.look_at_object(model, run, rank, name=name, layer=layer)
            sights.append(sight)
            step()
    figure = pictures.draw_attention(pixels, sights)
    caption = f'Sampling points of {", ".join(s.name for s in sights)} on {image.name}'
    _write(figure, caption, out or Path('attention.png'))


@visualize.command()
@click.argument('config')
@image_argument
@click.option('--against', multiple=True, metavar='CONFIG', help='A detector to draw beside.')
@click.option(
    '--annotations',
    type=click.Path(path_type=Path),
    help='COCO annotations, to draw what is there beside what was found.',
)
@click.option('--score', type=click.FloatRange(0, 1), default=0.3, show_default=True)
@device_option
@out_option
def detections(config, image, against, annotations, score, device, out) -> None:
    """Draw what is detected, beside the ground truth.

    \b
    Example:
      mmlite visualize detections lite.py,lite.pth photo.jpg
      mmlite visualize detections lite.py,lite.pth val/1.jpg --annotations val.json --score 0.5
    """
    from ..analysis import pictures

    check_device(device)
    pixels = _read(image)
    panels = []
    if annotations is not None:
        panels.append(('ground truth', *_ground_truth(annotations, image)))
    with progress() as start:
        references = (config, *against)
        step = start('detecting', len(references))
        for reference in references:
            model, name = _detector(reference, device)
            found = pictures.run_on(model, str(image))().pred_instances
            found = found[found.scores >= score]
            texts = [
                f'{pictures.label_text(model, int(label))} {sureness:.2f}'
                for label, sureness in zip(found.labels, found.scores)
            ]
            boxes = [tuple(box) for box in found.bboxes.tolist()]
            panels.append((f'{name}, score at least {score:g}', boxes, texts))
            step()
    figure = pictures.draw_detections(pixels, panels)
    _write(figure, f'Detections on {image.name}', out or Path('detections.png'))


@visualize.command()
@click.argument('config')
@click.argument('images', type=click.Path(path_type=Path))
@click.option('--against', multiple=True, metavar='CONFIG', help='A detector to draw below.')
@click.option('--max-images', type=click.IntRange(1), default=50, show_default=True)
@click.option('--json', 'json_path', type=click.Path(dir_okay=False, path_type=Path))
@device_option
@out_option
def levels(config, images, against, max_images, json_path, device, out) -> None:
    """Draw how the encoder's attention is spread over low and high levels, over a data set.

    IMAGES is a folder. Rows are the levels of the queries, columns those of the sampled points;
    grey where a layer of a Lite encoder does not update the level.

    \b
    Example:
      mmlite visualize levels lite.py,lite.pth val/ --against stock.py,stock.pth
      mmlite visualize levels lite.py,lite.pth val/ --max-images 200 --json levels.json
    """
    from ..analysis import pictures

    check_device(device)
    if not images.is_dir():
        raise FileNotFoundError(f'image folder {images} does not exist')
    paths = sorted(str(p) for p in images.iterdir() if p.suffix.lower() in _IMAGES)[:max_images]
    if not paths:
        raise ValueError(f'{images} holds no images ({", ".join(_IMAGES)})')
    masses = []
    with progress() as start:
        for reference in (config, *against):
            model, name = _detector(reference, device)
            step = start(name, len(paths))
            masses.append((name, pictures.mean_level_masses(model, paths, step)))
    figure = pictures.draw_level_masses(masses)
    caption = f'Attention of the encoder by level, mean over {len(paths)} images of {images.name}'
    _write(figure, caption, out or Path('levels.png'))
    if json_path:
        content = {'images': len(paths), 'masses': {n: _plain(m) for n, m in masses}}
        json_path.write_text(json.dumps(content, indent=2) + '\n')


def _plain(masses) -> list:
    """Nested lists; null for what a layer does not update."""
    return [
        [[None if v != v else round(v, 4) for v in row] for row in layer]
        for layer in masses.tolist()
    ]


def _detector(reference: str, device: str):
    from ..analysis import pictures
    from ..analysis.compare import Subject
    from ..analysis.models import build_detector, load_config

    config_name, _, checkpoint = reference.partition(',')
    config = load_config(config_name)
    model = build_detector(config, checkpoint or None, device)
    pictures.prepare(model, config)
    name = Subject(config_name).name
    return model, name if checkpoint else f'{name} (random weights)'


def _read(image: Path):
    import cv2

    if not image.is_file():
        raise FileNotFoundError(f'image {image} does not exist')
    pixels = cv2.imread(str(image))
    if pixels is None:
        raise ValueError(f'{image} is not an image that OpenCV can read')
    return pixels[..., ::-1]


def _ground_truth(annotations: Path, image: Path) -> tuple[list, list[str]]:
    from ..analysis.accuracy import Dataset

    Dataset(annotations, image.parent).check()
    content = json.loads(annotations.read_text())
    ids = [i['id'] for i in content['images'] if Path(i['file_name']).name == image.name]
    if not ids:
        raise ValueError(f'{annotations} does not list {image.name}')
    names = {category['id']: category['name'] for category in content['categories']}
    objects = [a for a in content['annotations'] if a['image_id'] == ids[0]]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (a['bbox'] for a in objects)]
    return boxes, [names[a['category_id']] for a in objects]


def _write(figure, caption: str, path: Path) -> None:
    from ..analysis import pictures

    picture = pictures.png(figure)
    page = path.with_suffix('.html')
    path.write_bytes(picture)
    page.write_text(pictures.page(caption, [(caption, picture)]))
    click.echo(f'{path} and {page} written')
