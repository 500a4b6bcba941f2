"""Exported detectors: loaded and run with NumPy, OpenCV and one inference runtime.

Neither torch nor MMDetection is imported here, except that a ``torch`` export needs torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .runtimes import library, openvino_core

DESCRIPTION = 'detector.json'
# Counts up whenever what the files of an export mean changes.
FORMAT_VERSION = 1


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
    """What was found in an image by a model of masks, best first.

    Attributes:
        boxes (np.ndarray): Around the masks, see :class:`Detections`.
        scores (np.ndarray): float32, shape (n, ).
        labels (np.ndarray): Indices into the classes, int64, shape (n, ).
        masks (np.ndarray): bool, in pixels of the image, shape (n, h, w).
        panoptic (np.ndarray, optional): Where the model makes panoptic maps: of each pixel label +
            1000 * instance, and the number of classes where there is nothing; int64, shape (h, w).
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    panoptic: np.ndarray | None = None


class _Session(Protocol):
    """A loaded model: inputs in their order to (boxes, scores, labels, ...)."""

    def __call__(self, *inputs: np.ndarray) -> Sequence[np.ndarray]: ...


def load(
    folder: str | os.PathLike, threads: int | None = None, precision: str = 'float32'
) -> Detector:
    """Load what ``mmlite export`` wrote.

    Args:
        folder (str | PathLike): The folder of the export.
        threads (int, optional): Threads of the runtime; by default its own choice.
        precision (str): ``'float32'``, or ``'bfloat16'`` (OpenVINO alone, and fast only on
            processors that have it).

    Returns:
        Detector: Ready to detect.

    Raises:
        FileNotFoundError: The folder holds no export, or the operators' library was not built.
        ImportError: The runtime is not installed.
        ValueError: The export is of another version, or the runtime does not take it.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f'{folder} holds no exported detector ({DESCRIPTION} is missing); '
            'write one with `mmlite export`'
        )
    description = json.loads(path.read_text(encoding='utf-8'))
    if description.get('version') != FORMAT_VERSION:
        raise ValueError(
            f'{path} was written by another version of mmlite (format '
            f'{description.get("version")}, this one reads {FORMAT_VERSION}); export again'
        )
    kind = description['format']
    if precision not in ('float32', 'bfloat16') or (precision, kind) == ('bfloat16', 'onnx'):
        raise ValueError(
            f"precision {precision!r} cannot be had from {kind}: 'float32' can, and 'bfloat16' "
            'from openvino'
        )
    model = folder / description['model']
    opened = _OPEN[kind](model, bool(description['portable']), threads, precision)
    return Detector(opened, description)


class Detector:
    """A detector that :func:`load` returned.

    Attributes:
        description (dict): What ``detector.json`` says.
        classes (list[str]): Names of the labels.
        session: Runs the model itself: takes float32 images (bs, 3, h, w), in the channel order
            of OpenCV and with values 0 to 255, and where the model takes padded images their
            sizes (h, w), int64 (bs, 2); returns boxes in pixels of these images, scores, labels,
            and what else ``outputs`` of the description names.
    """

    def __init__(self, session: _Session, description: dict[str, Any]) -> None:
        self.session = session
        self.description = description
        self.classes: list[str] = description['classes']

    def detect(self, image: np.ndarray, score_threshold: float = 0.0) -> Detections | Segmentations:
        """Find objects in an image.

        Args:
            image (np.ndarray): As ``cv2.imread`` gives it: BGR, uint8, shape (h, w, 3).
            score_threshold (float): Leave out what scores less.

        Returns:
            Detections | Segmentations: In pixels of ``image``; the second where the model makes
            masks.

        Raises:
            ValueError: This is no image, or one too small for the model.
        """
        return self.detect_batch([image], score_threshold)[0]

    def detect_batch(
        self, images: Sequence[np.ndarray], score_threshold: float = 0.0
    ) -> list[Detections | Segmentations]:
        """Find objects in several images, in one run where the model takes several.

        Args:
            images (Sequence[np.ndarray]): See :meth:`detect`; they may differ in size.
            score_threshold (float): Leave out what scores less.

        Returns:
            list[Detections | Segmentations]: One an image, in pixels of the image.

        Raises:
            ValueError: Something is no image, or too small for the model.
        """
        most = self.description['input']['batch']
        found: list[Detections | Segmentations] = []
        step = most or len(images)
        for start in range(0, len(images), max(step, 1)):
            found += self._run(images[start : start + step], most, score_threshold)
        return found

    def _run(
        self, images: Sequence[np.ndarray], batch: int | None, score_threshold: float
    ) -> list[Detections | Segmentations]:
        resized = [self.preprocess(image) for image in images]
        outputs = self.session(*self.arguments(resized, batch or len(resized)))
        found: list[Detections | Segmentations] = []
        for number, (image, content) in enumerate(zip(images, resized)):
            boxes, scores, labels, *maps = (output[number] for output in outputs)
            height, width = content.shape[1:]
            scale = np.array([width / image.shape[1], height / image.shape[0]] * 2, np.float32)
            keep = scores >= score_threshold
            boxes, scores, labels = boxes[keep] / scale, scores[keep], labels[keep]
            if not maps:
                found.append(Detections(boxes, scores, labels))
                continue
            size = image.shape[:2]
            masks = [resized_mask(mask[:height, :width], size) for mask in maps[0][keep]]
            found.append(
                Segmentations(
                    boxes,
                    scores,
                    labels,
                    np.stack(masks) if masks else np.zeros((0, *size), bool),
                    *(resized_map(segments[:height, :width], size) for segments in maps[1:]),
                )
            )
        return found

    def arguments(self, resized: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        """What :attr:`session` takes for preprocessed images, in a batch of ``count``.

        Args:
            resized (Sequence[np.ndarray]): What :meth:`preprocess` returned.
            count (int): As many as these, or more: what is missing is black.

        Returns:
            list[np.ndarray]: The images, and their sizes where the model takes them.
        """
        inputs = self.description['input']
        sizes = [image.shape[1:] for image in resized]
        divisor = inputs.get('divisor', 1)
        height = inputs['height'] or -(-max(h for h, _ in sizes) // divisor) * divisor
        width = inputs['width'] or -(-max(w for _, w in sizes) // divisor) * divisor
        canvas = np.zeros((count, 3, height, width), np.float32)
        for number, image in enumerate(resized):
            canvas[number, :, : image.shape[1], : image.shape[2]] = image
        if not inputs['padded']:
            return [canvas]
        return [canvas, np.array([*sizes, *[sizes[0]] * (count - len(sizes))], np.int64)]

    def arguments_of(self, image: np.ndarray) -> tuple[list[np.ndarray], tuple[int, int]]:
        """What :attr:`session` takes for one image, in as many copies as its batch has.

        Returns:
            tuple[list[np.ndarray], tuple[int, int]]: The arguments, and (h, w) of the image
            in them.
        """
        content = self.preprocess(image)
        count = self.description['input']['batch'] or 1
        height, width = content.shape[1:]
        return self.arguments([content] * count, count), (height, width)

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Resize an image as in the test pipeline of the config.

        Args:
            image (np.ndarray): See :meth:`detect`.

        Returns:
            np.ndarray: What the model takes, float32, shape (3, h, w).

        Raises:
            ValueError: This is no image.
        """
        import cv2

        if (
            not isinstance(image, np.ndarray)
            or image.ndim != 3
            or image.shape[2] != 3
            or image.dtype != np.uint8
            or 0 in image.shape
        ):
            got = getattr(image, 'shape', type(image).__name__)
            raise ValueError(
                'an image must be BGR, uint8, of shape (h, w, 3), as cv2.imread gives it '
                f'(None where it cannot read the file); got {got}'
            )
        size = resized_size(image.shape[:2], self.description['preprocessing']['resize'])
        if size != image.shape[:2]:
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)


def resized_size(size: tuple[int, int], resize: dict[str, Any] | None) -> tuple[int, int]:
    """The size (h, w) that an image of ``size`` is resized to.

    Args:
        size (tuple[int, int]): (h, w).
        resize (dict, optional): ``scale`` and ``keep_ratio`` of MMDetection's ``Resize``, or the
            ``canvas`` (h, w) that the image has to fit into.

    Returns:
        tuple[int, int]: (h, w).
    """
    if resize is None:
        return size
    height, width = size
    if 'canvas' in resize:
        factor = min(resize['canvas'][0] / height, resize['canvas'][1] / width)
    elif resize['keep_ratio']:
        long_side, short_side = max(resize['scale']), min(resize['scale'])
        factor = min(long_side / max(size), short_side / min(size))
    else:
        return resize['scale'][1], resize['scale'][0]
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A bool mask (h, w) in another size, its border between pixels where it was."""
    import cv2

    if mask.shape == size:
        return mask
    grey = cv2.resize(mask.astype(np.uint8) * 255, size[::-1], interpolation=cv2.INTER_LINEAR)
    return grey > 127


def resized_map(segments: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of segments, int64 (h, w), in another size, by the nearest pixel."""
    rows = np.arange(size[0]) * segments.shape[0] // size[0]
    columns = np.arange(size[1]) * segments.shape[1] // size[1]
    return segments[rows][:, columns]


# ---------------------------------------------------------------- runtimes


def _missing(runtime: str, error: ImportError) -> ImportError:
    return ImportError(f'{runtime} cannot be imported ({error}); install it: pip install {runtime}')


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())


def _open_onnx(model: Path, portable: bool, threads: int | None, precision: str) -> _Session:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing('onnxruntime', error) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings tell of the exporter's unused constants
    if threads:
        options.intra_op_num_threads = threads
    if not portable:
        operators = library('onnxruntime')
        try:
            options.register_custom_ops_library(str(operators))
        except Exception as error:  # the runtime's errors are of no common class
            raise ValueError(
                f'ONNX Runtime {onnxruntime.__version__} does not load the operators in '
                f'{operators}: {_one_line(error)}'
            ) from error
    try:
        session = onnxruntime.InferenceSession(
            str(model),
            options,
            providers=['CPUExecutionProvider'],
            # It fuses an addition and a norm into one node that is three times slower than both.
            disabled_optimizers=['SkipLayerNormFusion'],
        )
    except Exception as error:
        raise ValueError(
            f'ONNX Runtime {onnxruntime.__version__} does not take {model}: {_one_line(error)}'
        ) from error
    names = [argument.name for argument in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs)))


def _open_openvino(
    model: Path, portable: bool, threads: int | None, precision: str, profile: bool = False
) -> OpenVINOSession:
    try:
        import openvino
    except ImportError as error:
        raise _missing('openvino', error) from error
    hints = {
        'PERFORMANCE_HINT': 'LATENCY',
        # Its own choice would be bfloat16 wherever the processor is fast at it.
        'INFERENCE_PRECISION_HINT': {'float32': 'f32', 'bfloat16': 'bf16'}[precision],
    }
    if threads:
        hints['INFERENCE_NUM_THREADS'] = str(threads)
    if profile:
        hints['PERF_COUNT'] = 'YES'
    core = openvino_core()
    if not portable:
        operators = library('openvino')
        try:
            openvino_core(operators)
        except Exception as error:
            raise ValueError(
                f'OpenVINO {openvino.__version__} does not load the operators in {operators} (they '
                f'are built for one version of it; build them again): {_one_line(error)}'
            ) from error
    try:
        compiled = core.compile_model(str(model), 'CPU', hints)
    except Exception as error:
        raise ValueError(
            f'OpenVINO {openvino.__version__} does not take {model}: {_one_line(error)}'
        ) from error
    return OpenVINOSession(compiled)


class OpenVINOSession:
    """A model in OpenVINO.

    Attributes:
        request: OpenVINO's ``InferRequest``, which knows of the last run.
    """

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self._outputs = range(len(compiled.outputs))

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        self.request.infer(list(inputs), share_inputs=True)
        return [np.array(self.request.get_output_tensor(index).data) for index in self._outputs]


def _open_torch(model: Path, portable: bool, threads: int | None, precision: str) -> _Session:
    try:
        import torch
    except ImportError as error:
        raise _missing('torch', error) from error
    if not portable:
        pass  # noqa: F401(the operators register on import)

    program = torch.export.load(model).module()
    if threads:
        torch.set_num_threads(threads)

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = program(*(torch.from_numpy(array) for array in inputs))
        return [output.numpy() for output in outputs]

    return run


_OPEN: dict[str, Callable[..., Any]] = {
    'onnx': _open_onnx,
    'openvino': _open_openvino,
    'torch': _open_torch,
}


def open_session(
    folder: str | os.PathLike, threads: int | None = None, **options: Any
) -> Callable[..., Sequence[np.ndarray]]:
    """Open the model of a folder alone, in float32: what :attr:`Detector.session` is.

    Args:
        folder (str | PathLike): A folder with a model and its description.
        threads (int, optional): Threads of the runtime; by default its own choice.
        options: ``profile=True`` has OpenVINO count the time of every node.

    Returns:
        Callable: Arrays to arrays.
    """
    folder = Path(folder)
    description = json.loads((folder / DESCRIPTION).read_text(encoding='utf-8'))
    model = folder / description['model']
    return _OPEN[description['format']](
        model, bool(description['portable']), threads, 'float32', **options
    )
