"""Small objects whose class is a texture of one or two pixels: what only the largest map shows.

Everything that a coarse map could tell the classes apart by is left to chance: outline, size and
colours. Objects stand close together, so that several fall on one token of a coarse map.
"""

from __future__ import annotations

import cv2
import numpy as np

from mmlite.datasets import STYLES
from mmlite.datasets.shapes import Drawn, Style, background, overlap

CLASSES = ('stripes', 'checks', 'rim')

# Longest side of an object in pixels, and how often such sizes are drawn. By COCO's limits those
# up to 31 are small.
_SIDES = {'tiny': (6, 14), 'small': (14, 24), 'medium': (34, 44)}
_FREQUENCY = {'tiny': 0.5, 'small': 0.4, 'medium': 0.1}
_OBJECTS = (5, 12)
_NEAR_ANOTHER = 0.6  # of the objects: this share is placed a few pixels from one before it
_MAX_OVERLAP = 0.02


def draw_details(rng: np.random.Generator, image_size: int) -> tuple[np.ndarray, list[Drawn]]:
    """Draw one image.

    Returns:
        tuple: The pixels, uint8 (image_size, image_size, 3), and the objects.
    """
    pixels = background(rng, image_size)
    boxes: list[np.ndarray] = []
    objects: list[Drawn] = []
    for _ in range(rng.integers(*_OBJECTS, endpoint=True)):
        sizes = rng.choice(list(_SIDES), p=list(_FREQUENCY.values()))
        side = int(rng.integers(*_SIDES[sizes], endpoint=True))
        sides = np.round(side * rng.permutation([1.0, rng.uniform(0.75, 1)])).astype(int)
        corner = _place(rng, sides, boxes, image_size)
        box = np.concatenate([corner, corner + sides])
        if any(overlap(box, other) > _MAX_OVERLAP for other in boxes):
            continue  # no second try: crowded images hold fewer objects
        boxes.append(box)
        label = int(rng.integers(len(CLASSES)))
        outline = _outline(rng, sides)
        _paint(rng, pixels, corner, sides, outline, CLASSES[label])
        (x, y), (width, height) = corner.tolist(), sides.tolist()
        polygon = (corner + outline).round(2).flatten().tolist()
        objects.append((label, [x, y, width, height], width * height, polygon))
    return pixels, objects


def _place(
    rng: np.random.Generator, sides: np.ndarray, boxes: list[np.ndarray], image_size: int
) -> np.ndarray:
    """The upper left corner (x, y) of an object: anywhere, or beside one that is there."""
    room = image_size - sides
    if boxes and rng.random() < _NEAR_ANOTHER:
        other = boxes[rng.integers(len(boxes))]
        along = int(rng.integers(2))  # beside it or below it
        gap = int(rng.integers(1, 4))
        corner = other[:2] + rng.integers(-3, 4, 2)
        before = rng.random() < 0.5
        corner[along] = other[along] - sides[along] - gap if before else other[along + 2] + gap
        return np.clip(corner, 0, room)
    return rng.integers(0, room + 1)


def _outline(rng: np.random.Generator, sides: np.ndarray) -> np.ndarray:
    """Corners (N, 2) of a rectangle or an ellipse that fills its box, from the box's corner."""
    if rng.random() < 0.5:
        return np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * sides
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return (0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)) * sides


def _paint(
    rng: np.random.Generator,
    pixels: np.ndarray,
    corner: np.ndarray,
    sides: np.ndarray,
    outline: np.ndarray,
    name: str,
) -> None:
    """Fill an object with its texture, in a dark and a bright colour that are the same for all."""
    width, height = sides
    mask = np.zeros((height, width), np.uint8)
    # fillPoly draws through the centres of pixels, and the first one's is at 0.5
    cv2.fillPoly(mask, [np.round(16 * (outline - 0.5)).astype(np.int32)], 1, shift=4)
    step = int(rng.integers(1, 3))
    rows, columns = np.mgrid[0:height, 0:width] // step
    if name == 'stripes':
        bright = (rows if rng.random() < 0.5 else columns) % 2
    elif name == 'checks':
        bright = (rows + columns) % 2
    else:
        kernel = np.ones((3, 3), np.uint8)
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        bright = 1 - cv2.erode(padded, kernel, iterations=step)[1:-1, 1:-1]
    if rng.random() < 0.5:
        bright = 1 - bright
    dark, light = rng.uniform(0, 60, 3), rng.uniform(195, 255, 3)
    texture = np.where(bright[..., None] > 0, light, dark) + rng.normal(0, 8, (height, width, 3))
    (x, y) = corner
    inside = pixels[y : y + height, x : x + width]
    inside[mask > 0] = np.clip(texture, 0, 255).astype(np.uint8)[mask > 0]


DETAILS = Style(CLASSES, draw_details, smallest_image=64)


STYLES['details'] = DETAILS
