"""A small COCO-format data set that is drawn, not downloaded: shapes on varied backgrounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

CLASSES = ('disc', 'ring', 'triangle', 'cross')

# An object: the index of its class, its box [x, y, width, height] in pixels, the area of that box,
# by which COCO's evaluation counts its size, and its mask as a polygon [x1, y1, x2, y2, ...].
Drawn = tuple[int, list[int], int, list[float]]

# Longest side of a shape in pixels, for each of COCO's area ranges (small is below 32 * 32,
# large above 96 * 96), and how often the range is drawn.
_SIDES = {'small': (18, 29), 'medium': (36, 72), 'large': (100, 120)}
_FREQUENCY = {'small': 0.4, 'medium': 0.45, 'large': 0.15}
_MAX_OVERLAP = 0.15  # of the smaller box


class Style(NamedTuple):
    """What a data set shows."""

    classes: tuple[str, ...]
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, list[Drawn]]]
    smallest_image: int  # width and height in pixels


def generate_shapes(
    root: str | Path,
    splits: dict[str, int],
    image_size: int = 128,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    style: Style | None = None,
) -> None:
    """Draw a data set: ``root/<split>/*.png`` and ``root/annotations/instances_<split>.json``.

    ``root/semantic/<split>/*.png`` are maps of classes, of uint8: 0 is background, then as listed.
    ``splits`` gives each its number of images, as in ``{'train': 600, 'val': 100}``; ``image_size``
    is their width and height in pixels, at least 128 for shapes, else a ValueError. The same
    arguments draw the same pixels, and no two splits share an image. ``progress`` is called after
    each, and ``style`` is one of :data:`mmlite.datasets.STYLES`, shapes by default.
    """
    style = style or SHAPES
    least = style.smallest_image
    if image_size < least:
        raise ValueError(f'images of {image_size} pixels: at least {least} are needed')
    categories = [{'id': i, 'name': name} for i, name in enumerate(style.classes, start=1)]
    for number, (split, num_images) in enumerate(splits.items()):
        images, annotations = [], []
        for index in range(num_images):
            rng = np.random.default_rng((seed, number, index))
            pixels, objects = style.draw(rng, image_size)
            name = f'{index:05d}.png'
            semantic = np.zeros((image_size, image_size), np.uint8)
            for label, _, _, polygon in objects:
                corners = np.array(polygon).reshape(-1, 2) - 0.5
                cv2.fillPoly(
                    semantic, [(corners * 16).round().astype(np.int32)], label + 1, shift=4
                )
            for folder, picture in ((split, pixels), (f'semantic/{split}', semantic)):
                path = Path(root, folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                # imencode, as imwrite only returns False where it cannot write
                path.write_bytes(cv2.imencode('.png', picture)[1].tobytes())
            size = {'width': image_size, 'height': image_size}
            images.append({'id': index, 'file_name': name, **size})
            for label, box, area, polygon in objects:
                ids = {'id': len(annotations) + 1, 'image_id': index, 'category_id': label + 1}
                shape = {'bbox': box, 'area': area, 'segmentation': [polygon], 'iscrowd': 0}
                annotations.append({**ids, **shape})
            progress()
        content = {'images': images, 'annotations': annotations, 'categories': categories}
        target = Path(root, 'annotations', f'instances_{split}.json')
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content))


def draw_image(
    rng: np.random.Generator,
    image_size: int,
    sides: dict[str, tuple[int, int]] = _SIDES,
    frequency: dict[str, float] = _FREQUENCY,
    most_overlap: float = _MAX_OVERLAP,
    tries: tuple[int, int] = (2, 6),
    distinct: int = 0,
    gap: int = 0,
) -> tuple[np.ndarray, list[Drawn]]:
    """Draw one image: its pixels, uint8 (image_size, image_size, 3), and the shapes.

    ``tries`` is the least and the largest number of shapes, of which those are left out that would
    cover others or come within ``gap`` pixels of them. ``distinct`` draws at most one of each of
    the first so many classes.
    """
    left = list(range(distinct or len(CLASSES)))
    pixels = background(rng, image_size)
    boxes: list[np.ndarray] = []
    shapes = []
    for _ in range(rng.integers(*tries, endpoint=True)):
        if not left:
            break
        size = rng.choice(list(sides), p=list(frequency.values()))
        side = int(rng.integers(*sides[size], endpoint=True))
        label = left[int(rng.integers(len(left)))]
        parts = _outlines(rng, CLASSES[label], side)
        low, high = parts[0].min(0), parts[0].max(0)
        room = image_size - 1 - (high - low)
        shift = np.round(rng.uniform(0, 1, 2) * room - low)
        box = np.concatenate([low + shift, high + shift])
        around = box + np.array([-gap, -gap, gap, gap])
        if any(overlap(around, other) > most_overlap for other in boxes):
            continue  # no second try: crowded images hold fewer shapes
        boxes.append(box)
        if distinct:
            left.remove(label)
        parts = [part + shift for part in parts]
        # A bright or dark colour, which stands out from the background.
        color = rng.uniform(0, 45, 3)
        color[rng.permutation(3)[: rng.integers(0, 3)]] = rng.uniform(210, 255)
        fixed_point = [np.round(part * 16).astype(np.int32) for part in parts]  # even-odd rule
        cv2.fillPoly(pixels, fixed_point, color.tolist(), lineType=cv2.LINE_AA, shift=4)
        x, y, *_ = corner = np.floor(box[:2]).astype(int).tolist()
        width, height = (np.ceil(box[2:]).astype(int) + 1 - corner).tolist()
        shapes.append((label, [x, y, width, height], width * height, _polygon(*parts)))
    return pixels, shapes


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A gradient between two dull colours, with stripes or blotches, and noise."""
    first, second = rng.uniform(50, 200, (2, 3))
    rows, columns = np.mgrid[0:size, 0:size] / size
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * rows + np.sin(angle) * columns
    if rng.random() < 0.5:
        along = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 6) * along)
    else:
        along = cv2.resize(rng.random((5, 5)), (size, size), interpolation=cv2.INTER_CUBIC)
    along = np.clip(along, 0, 1)[..., None]
    pixels = (1 - along) * first + along * second + rng.normal(0, 8, (size, size, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _outlines(rng: np.random.Generator, name: str, side: int) -> list[np.ndarray]:
    """The corners (N, 2) of a shape around the origin, then those of the hole in it."""
    angles = np.linspace(0, 2 * np.pi, 3 if name == 'triangle' else 48, endpoint=False)
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if name in ('disc', 'ring'):
        stretch = rng.uniform(0.75, 1, 2)
        outline = side / 2 * (stretch / stretch.max()) * outline
        return [outline, 0.55 * outline] if name == 'ring' else [outline]
    if name == 'cross':
        # An arm's half width is 0.28 of its length: three corners an arm, four arms.
        arm = np.array([[0.28, -0.28], [1, -0.28], [1, 0.28]])
        quarter_turn = np.array([[0, 1], [-1, 0]])
        outline = np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])
    turn = rng.uniform(0, 2 * np.pi)
    outline = outline @ [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    return [outline * side / np.ptp(outline, axis=0).max()]


def _polygon(outline: np.ndarray, *holes: np.ndarray) -> list[float]:
    """COCO's polygon of a shape, in its coordinates: the centre of the first pixel is 0.5."""
    for hole in holes:  # one line in, around the hole the other way, and out again
        outline = np.concatenate([outline, outline[:1], hole[:1], hole[:0:-1], hole[:1]])
    return (outline + 0.5).round(2).flatten().tolist()


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """The share of the smaller box (x1, y1, x2, y2) inside the other one."""
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    smaller = min(np.prod(box[2:] - box[:2]), np.prod(other[2:] - other[:2]))
    return float(np.prod(np.clip(sides, 0, None)) / smaller)


SHAPES = Style(CLASSES, draw_image, smallest_image=128)
# Large and apart from each other: learned in minutes.
_large = partial(draw_image, sides={'large': (44, 72)}, frequency={'large': 1.0}, most_overlap=0.0)
LARGE_SHAPES = Style(CLASSES, _large, smallest_image=128)
# For masks: after minutes of training one may cover two of a kind, a cross and a triangle, or two
# shapes that touch.
_three = partial(_large, sides={'large': (40, 64)}, tries=(6, 10), distinct=3, gap=10)
THREE_SHAPES = Style(CLASSES[:3], _three, smallest_image=128)
# What can be drawn, by name.
STYLES = {'shapes': SHAPES, 'large-shapes': LARGE_SHAPES, 'three-shapes': THREE_SHAPES}
