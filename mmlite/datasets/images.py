"""Decoding image files to see whether they can be trained on."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

import cv2
import numpy as np
from mmengine.fileio import get
from PIL import Image, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = None  # training knows no limit either
Image.init()  # or threads may find half of the formats


def image_problems(
    image: dict, backend_args: dict | None = None, turns: bool = True
) -> Iterator[tuple[str, str]]:
    """Decode an image whole, and yield the kind of what is wrong and what to say of it.

    ``image`` has its ``path`` and its ``size`` in the annotation file, width and height in pixels,
    which becomes the size that training sees. Pillow is strict, where OpenCV gives grey pixels for
    the missing part of a truncated JPEG; OpenCV decodes as training does, which ``turns`` images as
    their EXIF data ask for.
    """
    try:
        content = get(image['path'], backend_args)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        yield 'missing image' if missing else 'unreadable image', ''
        return
    orientation = 1  # EXIF's number of an upright image
    try:
        with Image.open(io.BytesIO(content)) as opened:
            orientation = opened.getexif().get(0x0112, 1)
            opened.load()
    except UnidentifiedImageError:
        pass  # a format that only OpenCV knows, or no image
    except Exception:  # each format has errors of its own for data that end too soon
        yield 'truncated image', ''
        return
    data, raw = np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR if turns else raw)
        # OpenCV follows the orientation of some formats only.
        if orientation != 1 and np.array_equal(pixels, cv2.imdecode(data, raw)):
            orientation = 1
    except cv2.error:
        pixels = None
    if pixels is None:
        yield 'unreadable image', ''
        return
    listed, size = image['size'], (pixels.shape[1], pixels.shape[0])
    image['size'] = size
    sizes = ' in the file, '.join(f'{width}x{height}' for width, height in (listed, size))
    # Width and height exchanged, and listed so: the boxes are for the turned image.
    meant = orientation >= 5 and size == listed and len(set(size)) > 1
    if orientation != 1 and not meant:
        yield 'image turned by EXIF', f': orientation {orientation}, {sizes} in truth'
    elif size != listed:
        yield 'image of another size', f': {sizes} in truth'


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Send nowhere what the decoders' C libraries write; Python's stderr goes on."""
    with os.fdopen(os.dup(2), 'w') as terminal, contextlib.redirect_stderr(terminal):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            yield
        finally:
            os.dup2(terminal.fileno(), 2)
