"""Decoding image files to see whether they can be trained on, in several processes.

The processes start afresh and often, so nothing here loads PyTorch or MMDetection.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

_ORIENTATION = 0x0112  # of EXIF: 1 is upright


class ImageFile(NamedTuple):
    """An image to decode."""

    path: str  # or the address that backend_args read
    backend_args: dict[str, Any] | None = None  # as for MMDetection's data sets
    ignore_orientation: bool = False  # do not turn the image as its EXIF data ask for


class DecodedImage(NamedTuple):
    """What became of it."""

    size: tuple[int, int] | None = None  # width and height in pixels, as training sees them
    problem: str | None = None  # 'missing image', 'unreadable image' or 'truncated image'
    orientation: int = 1  # how training sees it turned or mirrored: EXIF's number


def decode_images(files: Sequence[ImageFile], workers: int) -> Iterator[DecodedImage]:
    """Decode images in ``workers`` processes, in the order of ``files``."""
    if not files:
        return
    with ProcessPoolExecutor(
        min(workers, len(files)), mp_context=get_context('spawn'), initializer=_prepare_process
    ) as pool:
        yield from pool.map(decode, files, chunksize=max(1, min(16, len(files) // workers)))


def decode(file: ImageFile) -> DecodedImage:
    """Decode one image whole, strictly with Pillow and then with OpenCV, as training does.

    OpenCV alone gives grey pixels for the missing part of a truncated JPEG in some versions, and
    nothing in others.
    """
    try:
        content = _read(file)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return DecodedImage(problem='missing image' if missing else 'unreadable image')
    orientation = 1
    try:
        with Image.open(io.BytesIO(content)) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            image.load()
    except UnidentifiedImageError:
        pass  # a format that only OpenCV knows, or no image
    except Exception:  # each format has errors of its own for data that end too soon
        return DecodedImage(problem='truncated image')
    data, raw = np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(data, raw if file.ignore_orientation else cv2.IMREAD_COLOR)
        # OpenCV follows the orientation of some formats only.
        if orientation != 1 and np.array_equal(pixels, cv2.imdecode(data, raw)):
            orientation = 1
    except cv2.error:
        pixels = None
    if pixels is None:
        return DecodedImage(problem='unreadable image')
    return DecodedImage((pixels.shape[1], pixels.shape[0]), orientation=orientation)


def _read(file: ImageFile) -> bytes:
    if file.backend_args is None:
        with open(file.path, 'rb') as stream:
            return stream.read()
    from mmengine.fileio import get

    return get(file.path, file.backend_args)


def _prepare_process() -> None:
    cv2.setNumThreads(0)
    warnings.simplefilter('ignore')
    Image.MAX_IMAGE_PIXELS = None  # training knows no limit either
    # The decoders' C libraries write remarks on broken files to the terminal themselves.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
