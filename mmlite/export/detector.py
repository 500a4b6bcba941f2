"""Exported detectors, loaded and run with NumPy, OpenCV and one inference runtime.

Neither torch nor MMDetection is imported here, except that a ``torch`` export needs torch.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .runtimes import OPEN, Session, check_threads, processor_gains

DESCRIPTION = 'detector.json'
_NEEDED = {
    'model': str,
    'portable': (str, type(None)),
    'classes': list,
    'input': dict,
    'preprocessing': dict,
    'outputs': list,
}
# Counts up whenever what the files of an export mean changes.
FORMAT_VERSION = 3


class Detections(NamedTuple):
    """What was found in an image, best first.

    Attributes:
        boxes (np.ndarray): (x1, y1, x2, y2) in pixels of the image, float32, shape (n, 4).
        scores (np.ndarray): float32, shape (n, ).
        labels (np.ndarray): Indices into the classes, int64, shape (n, ).
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class Segmentations(NamedTuple):
    """What a model of masks found in an image: :class:`Detections`, and their masks.

    Attributes:
        masks (np.ndarray): bool, in pixels of the image, shape (n, h, w).
        panoptic (np.ndarray, optional): Where the model makes panoptic maps: of each pixel label +
            1000 * instance, and the number of classes where there is nothing; int64, shape (h, w).
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    panoptic: np.ndarray | None = None


def load(
    folder: str | os.PathLike, threads: int | None = None, precision: str = 'float32'
) -> Detector:
    """Load what ``mmlite export`` wrote.

    Args:
        folder (str | PathLike): The folder of the export.
        threads (int, optional): Threads of the runtime; by default its own choice.
        precision (str): ``'float32'``, or ``'bfloat16'`` (OpenVINO alone, fast where it is native).

    Returns:
        Detector: Several threads may share it.

    Raises:
        FileNotFoundError: The folder holds no export, or the operators' library was not built.
        ImportError: The runtime is not installed.
        ValueError: The export is of another version, or the runtime does not take it.
    """
    if not (Path(folder) / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f'{folder} holds no exported detector ({DESCRIPTION} is missing); '
            'write one with `mmlite export`'
        )
    description = read_description(folder)
    found = description.get('version')
    if found != FORMAT_VERSION:
        raise ValueError(
            f'{folder} was written by another version of mmlite (format {found}, this one reads '
            f'{FORMAT_VERSION}); export again'
        )
    kind = str(description.get('format'))
    if kind not in OPEN:
        raise ValueError(f'{folder} is for {kind}, which mmlite does not run; see docs/deploy.md')
    if precision != 'float32' and (precision, kind) != ('bfloat16', 'openvino'):
        raise ValueError(
            f"precision {precision!r} cannot be had from {kind}: 'float32' can, and 'bfloat16' "
            'from openvino'
        )
    for name, wanted in _NEEDED.items():
        if name not in description or not isinstance(description[name], wanted):
            value = repr(description[name]) if name in description else 'missing'
            raise ValueError(f'{folder}/{DESCRIPTION} is damaged: {name} is {value}; export again')
    model = Path(folder) / description['model']
    if not model.exists():
        raise FileNotFoundError(f'{folder} lacks its model {description["model"]}; export again')
    any_size = description.get('int8') and not description['input']['height']
    for asked in (precision, 'int8' if any_size else ''):
        is_faster, why = processor_gains().get(asked, (True, ''))
        if not is_faster:
            warnings.warn(f'{folder} in {asked} on this processor: {why}', stacklevel=2)
    check_threads(threads)
    session = OPEN[kind](model, bool(description['portable']), threads, precision)
    return Detector(session, description)


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """What ``detector.json`` of an export says."""
    path = Path(folder) / DESCRIPTION
    try:
        return dict(json.loads(path.read_text('utf-8')))
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path} is damaged: {error}; export again') from error


def write_description(folder: str | os.PathLike, description: dict[str, Any]) -> None:
    """Write ``detector.json``."""
    (Path(folder) / DESCRIPTION).write_text(json.dumps(description, indent=2) + '\n', 'utf-8')


def read_image(file: str | os.PathLike, decoder: str = 'cv2') -> np.ndarray:
    """Read an image file as MMDetection's ``LoadImageFromFile`` does: BGR, uint8, (h, w, 3).

    It is turned as its EXIF data ask for, 16 bits become 8, grey, palettes and CMYK become colours,
    and alpha is left out. ``decoder`` is ``imdecode_backend`` of the pipeline, ``'cv2'`` or
    ``'pillow'``. OSError where there is no such file, ValueError where it is no image.
    """
    import cv2

    content, image = Path(file).read_bytes(), None
    try:
        if decoder == 'pillow':
            from PIL import Image, ImageOps

            opened = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            if opened.mode == 'LA':  # as MMCV lays it over a colour
                ground = Image.new('RGB', opened.size, (124, 117, 104))
                ground.paste(opened.convert('RGBA'), mask=opened.getchannel('A'))
                opened = ground
            image = np.array(opened.convert('RGB'))[..., ::-1]
        elif content:
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except (cv2.error, OSError, ValueError, SyntaxError):  # each format has errors of its own
        pass
    if image is None:
        raise ValueError(f'{file} cannot be read as an image')
    return np.ascontiguousarray(image)


class Detector:
    """A detector that :func:`load` or :func:`mmlite.load` returned.

    Attributes:
        description (dict): What ``detector.json`` says.
        classes (list[str]): Names of the labels.
        session: Runs the model itself: takes float32 images (bs, 3, h, w), BGR of 0 to 255, and
            where they may be padded their sizes (h, w), int64 (bs, 2); returns boxes in pixels of
            these images, scores, labels, and what else ``outputs`` of the description names.
    """

    def __init__(self, session: Session, description: dict[str, Any]) -> None:
        self.session = session
        self.description = description
        self.classes: list[str] = description['classes']

    def read(self, file: str | os.PathLike) -> np.ndarray:
        """:func:`read_image` with the decoder that the model was trained with."""
        return read_image(file, self.description['preprocessing'].get('decoder', 'cv2'))

    def read_all(self, images: Sequence[np.ndarray | str | os.PathLike]) -> list[np.ndarray]:
        """:meth:`read` those among the images that are files."""
        return [self.read(i) if isinstance(i, (str, os.PathLike)) else i for i in images]

    def detect(
        self, image: np.ndarray | str | os.PathLike, score_threshold: float = 0.0
    ) -> Detections | Segmentations:
        """Find objects in an image.

        Args:
            image (np.ndarray | str | PathLike): As ``cv2.imread`` gives it: BGR, uint8, shape
                (h, w, 3). Or a file for :meth:`read`.
            score_threshold (float): Leave out what scores less.

        Returns:
            Detections | Segmentations: In pixels of ``image``; the second where there are masks.

        Raises:
            ValueError: This is no image, or one too small for the model, or no threshold.
        """
        return self.detect_batch([image], score_threshold)[0]

    def detect_batch(
        self, images: Sequence[np.ndarray | str | os.PathLike], score_threshold: float = 0.0
    ) -> list[Detections | Segmentations]:
        """:meth:`detect` for images of any sizes, in one run where the model takes several."""
        if isinstance(images, (str, os.PathLike)):
            raise ValueError(f'detect_batch takes a list of images; got {images!r}')
        if not (isinstance(score_threshold, Real) and score_threshold <= 1):
            what = f'a number of at most 1; got {score_threshold!r}'
            raise ValueError(f'score_threshold must be {what}')
        images = self.read_all(images)
        count = self.description['input']['batch'] or max(len(images), 1)
        found = []
        for start in range(0, len(images), count):
            batch = images[start : start + count]
            outputs = self.session(*self.arguments(list(map(self.preprocess, batch)), count))
            for number, image in enumerate(batch):
                size = self.resized_size(image)
                resized = detections_of(outputs, number, size, score_threshold)
                found.append(in_another_size(resized, size, image.shape[:2]))
        return found

    def arguments(self, contents: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        """What :attr:`session` takes for preprocessed images; black ones make up the ``count``."""
        inputs = self.description['input']
        sizes = [content.shape[1:] for content in contents]
        height, width = -(-np.max(sizes, 0) // inputs['divisor']) * inputs['divisor']
        height, width = inputs['height'] or height, inputs['width'] or width
        check_size(inputs, height, width)
        canvas = np.zeros((count, 3, height, width), np.float32)
        for number, content in enumerate(contents):
            canvas[number, :, : content.shape[1], : content.shape[2]] = content
        if not inputs['padded']:
            return [canvas]
        return [canvas, np.array([*sizes, *[sizes[0]] * (count - len(sizes))], np.int64)]

    def arguments_of(self, image: np.ndarray) -> list[np.ndarray]:
        """What :attr:`session` takes for one image, in as many copies as its batch has."""
        count = self.description['input']['batch'] or 1
        return self.arguments([self.preprocess(image)] * count, count)

    def resized_size(self, image: np.ndarray) -> tuple[int, int]:
        """The size (h, w) that an image is resized to."""
        return resized_size(image.shape[:2], self.description['preprocessing']['resize'])

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Resize and pad an image as the test pipeline does: float32, shape (3, h, w)."""
        is_array = isinstance(image, np.ndarray)
        if not is_array or (image.shape[2:], image.dtype) != ((3,), np.uint8) or 0 in image.shape:
            got = f'{image.dtype} of shape {image.shape}' if is_array else type(image).__name__
            raise ValueError(
                'an image must be BGR, uint8, of shape (h, w, 3), as cv2.imread gives it '
                f'(None where it cannot read the file); got {got}'
            )
        preprocessing = self.description['preprocessing']
        size = self.resized_size(image)
        if preprocessing.get('to_float32'):
            image = image.astype(np.float32)
        if size != image.shape[:2]:
            image = resized_image(image, size, preprocessing['resize'].get('backend', 'cv2'))
        if preprocessing['pad'] is not None:
            image = padded_image(image, **preprocessing['pad'])
        return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)


def check_size(inputs: dict[str, Any], height: int, width: int) -> None:
    """Refuse images whose pyramid has fewer tokens than the detector chooses.

    ``levels`` are a stride and a rest each: a side gives ``(side + rest) // stride`` rows.
    """
    tokens = sum((height + rest) // s * ((width + rest) // s) for s, rest in inputs['levels'])
    queries, least = inputs['least_tokens'], inputs.get('least_side', 1)
    reason = None
    if tokens < queries:
        reason = f'it gives {tokens} tokens, and {queries} queries are chosen among them'
    elif min(height, width) < least:
        reason = f'a program of torch takes no side below {least}; export it for ONNX Runtime'
    if reason:
        size = f'{height} x {width} pixels, as the model gets it'
        raise ValueError(f'an image of {size}, is too small for the model: {reason}')


def detections_of(
    outputs: Sequence[np.ndarray], number: int, size: tuple[int, int], score_threshold: float = 0.0
) -> Detections | Segmentations:
    """What a session says of one image, of ``size`` (h, w) without padding, in its pixels."""
    boxes, scores, labels, *maps = (output[number] for output in outputs)
    keep = scores >= max(score_threshold, 0.0)  # what a graph leaves out scores -1
    kept = boxes[keep], scores[keep], labels[keep]
    if not maps:
        return Detections(*kept)
    masks, *panoptic = (one[..., : size[0], : size[1]] for one in maps)
    return Segmentations(*kept, masks[keep], *panoptic)


def in_another_size(
    found: Detections | Segmentations, size: tuple[int, int], wanted: tuple[int, int]
) -> Detections | Segmentations:
    """Detections in an image of ``size`` (h, w), scaled to ``wanted`` (h, w)."""
    scale = np.array([size[1] / wanted[1], size[0] / wanted[0]] * 2, np.float32)
    found = found._replace(boxes=found.boxes / scale)
    if isinstance(found, Detections):
        return found
    masks = np.zeros((len(found.masks), *wanted), bool)
    for number, mask in enumerate(found.masks):  # whose border stays where it was
        masks[number] = resized_image(mask.astype(np.uint8) * 255, wanted) > 127
    panoptic = found.panoptic
    if panoptic is not None:  # by the nearest pixel
        rows, columns = (np.arange(new) * old // new for old, new in zip(size, wanted))
        panoptic = panoptic[rows][:, columns]
    return found._replace(masks=masks, panoptic=panoptic)


def resized_size(size: tuple[int, int], resize: dict[str, Any] | None) -> tuple[int, int]:
    """The size (h, w) that an image of ``size`` (h, w) is resized to.

    ``resize`` has ``scale`` (w, h) and ``keep_ratio`` of MMDetection's ``Resize``, ``rounds_down``
    for ``FixScaleResize``; or the ``canvas`` (h, w) to fit into.
    """
    if resize is None:
        return size
    if 'canvas' in resize:
        factor = min(most / side for most, side in zip(resize['canvas'], size))
    elif resize['keep_ratio']:
        factor = min(max(resize['scale']) / max(size), min(resize['scale']) / min(size))
    else:
        return resize['scale'][1], resize['scale'][0]
    half = 0.0 if resize.get('rounds_down') else 0.5
    return max(int(size[0] * factor + half), 1), max(int(size[1] * factor + half), 1)


def resized_image(image: np.ndarray, size: tuple[int, int], backend: str = 'cv2') -> np.ndarray:
    """Resize an image, (h, w) or (h, w, 3), bilinearly as MMCV does; by Pillow uint8 alone."""
    if backend == 'pillow':
        from PIL import Image

        return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    import cv2

    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def padded_image(image: np.ndarray, value, size=(0, 0), size_divisor: int = 1) -> np.ndarray:
    """Pad an image (h, w, 3) at the right and bottom, as MMCV's ``impad``."""
    least = np.maximum(image.shape[:2], size)
    height, width = -(-least // size_divisor) * size_divisor
    padded = np.full((height, width, 3), value, image.dtype)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded
