"""Write a detector for an inference runtime, describe it, and compare it with PyTorch."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn

from .. import __version__
from .detector import DESCRIPTION, FORMAT_VERSION, Detections, Detector, load
from .graph import num_predictions
from .program import check_opset, to_onnx, trace

FORMATS = ('onnx', 'openvino', 'torch')
REPORT = 'report.json'
# What the model is called in its folder.
FILES = {'onnx': 'model.onnx', 'openvino': 'model.xml', 'torch': 'model.pt2'}
_PACKAGES = {'onnx': 'onnxruntime', 'openvino': 'openvino', 'torch': 'torch'}


class Difference(NamedTuple):
    """How far an exported detector is from PyTorch.

    Attributes:
        boxes (float): Largest difference of a side of a box, in parts of the image's side.
        scores (float): Largest difference of a score.
    """

    boxes: float
    scores: float


def export_detector(
    model: nn.Module,
    folder: str | os.PathLike,
    format: str = 'onnx',
    config: Config | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    portable: bool = False,
    opset: int = 18,
) -> Detector:
    """Write a detector, from image to boxes, scores and labels, and load it again.

    Args:
        model (nn.Module): A detector of MMDetection or mmlite: Deformable DETR, DINO or
            H-Deformable-DETR, stock or Lite.
        folder (str | PathLike): Where ``model.*`` and ``detector.json`` go.
        format (str): ``'onnx'``, ``'openvino'`` or ``'torch'`` (torch.export).
        config (Config, optional): Where the names of the classes and the test pipeline's
            ``Resize`` are read.
        size (tuple[int, int], optional): (h, w) of the canvas that images are fitted into; None
            for images of any size.
        batch (int, optional): Images at a time; None for any number.
        portable (bool): Use no operators of ours: slower, for runtimes that take none.
        opset (int): Version of ONNX's operators.

    Returns:
        Detector: The exported detector, loaded.

    Raises:
        ImportError: A package that the format needs is missing.
        FileNotFoundError: The runtime's operators were not built.
        ValueError: The detector cannot be exported so; the message says why.
    """
    if format not in FORMATS:
        raise ValueError(f'format must be one of {", ".join(FORMATS)}; got {format!r}')
    check_opset(opset)
    # A single image of any size is never padded, and then nothing need be masked.
    padded = batch != 1 or size is not None
    program = trace(model, size, batch, padded, portable)
    return write_program(
        program, folder, format, describe(model, config, size, batch, portable), opset
    )


def write_program(
    program: torch.export.ExportedProgram,
    folder: str | os.PathLike,
    format: str,
    description: dict[str, Any],
    opset: int = 18,
) -> Detector:
    """Write a traced detector and its description; see :func:`export_detector`.

    Args:
        program (ExportedProgram): What :func:`mmlite.export.program.trace` returned.
        folder (str | PathLike): Where the files go.
        format (str): One of :data:`FORMATS`.
        description (dict): What :func:`describe` returned for the same model and sizes.
        opset (int): Version of ONNX's operators.

    Returns:
        Detector: The written detector, loaded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[format]
    if format == 'torch':
        torch.export.save(program, path)
    elif format == 'onnx':
        to_onnx(program, path, opset)
    else:
        to_openvino(program, path, description['portable'], opset)
    text = json.dumps({**description, 'format': format, 'model': path.name}, indent=2) + '\n'
    (folder / DESCRIPTION).write_text(text, encoding='utf-8')
    return load(folder)


def to_openvino(
    program: torch.export.ExportedProgram, path: Path, portable: bool = False, opset: int = 18
) -> None:
    """Write a traced detector as OpenVINO's own model, by way of ONNX.

    Args:
        program (ExportedProgram): What :func:`mmlite.export.program.trace` returned.
        path (Path): The ``.xml``; a ``.bin`` goes beside it.
        portable (bool): Whether it was traced so.
        opset (int): Version of ONNX's operators.

    Raises:
        ImportError: openvino is missing.
        FileNotFoundError: Our operators were not built for it.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            f'openvino cannot be imported ({error}); install it: pip install openvino'
        ) from error
    from .doors import library

    core = openvino.Core()
    if not portable:
        core.add_extension(str(library('openvino')))
    onnx_path = path.with_name(FILES['onnx'])
    to_onnx(program, onnx_path, opset)
    openvino.save_model(core.read_model(str(onnx_path)), str(path), compress_to_fp16=False)
    for left_over in path.parent.glob(f'{onnx_path.name}*'):
        left_over.unlink()


def describe(
    model: nn.Module,
    config: Config | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    portable: bool = False,
) -> dict[str, Any]:
    """What ``detector.json`` says, but for the file; arguments as in :func:`export_detector`."""
    preprocessor = model.data_preprocessor
    normalises = getattr(preprocessor, '_enable_normalize', False)
    resize = _resize(config)
    if size is not None:
        resize = {'canvas': list(size)}
    schedule = getattr(model.encoder, 'schedule', None)
    return {
        'version': FORMAT_VERSION,
        'mmlite': __version__,
        'detector': type(model).__name__,
        'schedule': None if schedule is None else str(schedule),
        'classes': _classes(model, config),
        'num_predictions': num_predictions(model),
        'portable': portable,
        'input': {
            'batch': batch,
            'height': size and size[0],
            'width': size and size[1],
            'padded': batch != 1 or size is not None,
        },
        'preprocessing': {
            'resize': resize,
            'channels': 'BGR',
            # Done by the model itself; here for the record.
            'in_the_model': {
                'to_rgb': bool(getattr(preprocessor, '_channel_conversion', False)),
                'mean': preprocessor.mean.flatten().tolist() if normalises else None,
                'std': preprocessor.std.flatten().tolist() if normalises else None,
            },
        },
    }


def _resize(config: Config | None) -> dict[str, Any] | None:
    """The test pipeline's ``Resize``."""
    dataset = (config or {}).get('test_dataloader', {}).get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    for step in dataset.get('pipeline', []):
        if step.get('type') in ('Resize', 'mmdet.Resize') and 'scale' in step:
            scale = step['scale']
            scale = [scale, scale] if isinstance(scale, (int, float)) else list(scale)
            return {'scale': scale, 'keep_ratio': bool(step.get('keep_ratio', False))}
    return None


def _classes(model: nn.Module, config: Config | None) -> list[str]:
    """Names of the labels: the model's, the config's, the data set's, or numbers."""
    count = model.bbox_head.num_classes
    dataset = (config or {}).get('test_dataloader', {}).get('dataset', {})
    kind = DATASETS.get(dataset.get('type', '')) if dataset else None
    for meta in (
        getattr(model, 'dataset_meta', None),
        dataset.get('metainfo'),
        getattr(kind, 'METAINFO', None),
    ):
        names = (meta or {}).get('classes', ())
        if len(names) == count and not isinstance(names, str):
            return list(names)
    return [str(label) for label in range(count)]


# ---------------------------------------------------------------- comparison


def compare(
    model: nn.Module, detector: Detector, images: Sequence[np.ndarray], repeats: int = 3
) -> dict[str, Any]:
    """Run PyTorch and the exported detector on the same images.

    Args:
        model (nn.Module): The detector that was exported, run as MMDetection runs it.
        detector (Detector): What it was exported to.
        images (Sequence[np.ndarray]): As ``cv2.imread`` gives them.
        repeats (int): Measured runs of the first image; the median counts.

    Returns:
        dict: ``boxes`` and ``scores`` of the largest :class:`Difference`, ``latency_ms`` of both
        (the model alone, on one image, resized), and versions.
    """
    worst = Difference(0.0, 0.0)
    for image in images:
        arguments = _arguments(detector, image)
        boxes, scores, labels = (output[0] for output in detector.session(*arguments))
        expected = predict(model, arguments[0], [detector.preprocess(image).shape[1:]])[0]
        found = difference(expected, Detections(boxes, scores, labels), arguments[0].shape[-2:])
        worst = Difference(*map(max, worst, found))
    arguments = _arguments(detector, images[0])
    size = detector.preprocess(images[0]).shape[1:]
    kind = detector.description['format']
    return {
        **worst._asdict(),
        'images': len(images),
        'latency_ms': {
            'pytorch': _milliseconds(lambda: predict(model, arguments[0][:1], [size]), repeats),
            kind: _milliseconds(lambda: detector.session(*arguments), repeats),
        },
        'batch': len(arguments[0]),
        'threads': torch.get_num_threads(),
        'versions': {
            'python': platform.python_version(),
            'torch': torch.__version__,
            _PACKAGES[kind]: __import__(_PACKAGES[kind]).__version__,
        },
    }


def _arguments(detector: Detector, image: np.ndarray) -> list[np.ndarray]:
    """What the exported model takes for one image, in as many copies as its batch has."""
    inputs = detector.description['input']
    content = detector.preprocess(image)
    height, width = content.shape[1:]
    count = inputs['batch'] or 1
    canvas = np.zeros((count, 3, inputs['height'] or height, inputs['width'] or width), np.float32)
    canvas[:, :, :height, :width] = content
    sizes = np.array([[height, width]] * count, np.int64)
    return [canvas, sizes] if inputs['padded'] else [canvas]


def predict(
    model: nn.Module, images: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> list[Detections]:
    """MMDetection's own predictions.

    Args:
        model (nn.Module): The detector.
        images (np.ndarray): As the exported model takes them: padded, float32, BGR, shape
            (bs, 3, h, w).
        sizes (Sequence[tuple[int, int]]): (h, w) of each without padding.

    Returns:
        list[Detections]: In pixels of ``images``, one an image.
    """
    preprocessor = model.data_preprocessor
    batch = torch.zeros(images.shape)
    samples = []
    for number, (height, width) in enumerate(sizes):
        content = torch.from_numpy(images[number, :, :height, :width].copy())
        batch[number, :, :height, :width] = preprocessor({'inputs': [content]})['inputs'][
            0, :, :height, :width
        ]
        shape = tuple(images.shape[-2:])
        samples.append(
            DetDataSample(
                metainfo=dict(
                    img_shape=(height, width),
                    batch_input_shape=shape,
                    pad_shape=shape,
                    ori_shape=(height, width),
                    scale_factor=(1.0, 1.0),
                )
            )
        )
    with torch.inference_mode():
        results = model.predict(batch[: len(sizes)], samples, rescale=False)
    return [
        Detections(*(results_of[name].numpy() for name in ('bboxes', 'scores', 'labels')))
        for results_of in (result.pred_instances for result in results)
    ]


def difference(expected: Detections, actual: Detections, size: tuple[int, int]) -> Difference:
    """Compare two lists of detections, whose order may differ where scores are equal.

    Args:
        expected (Detections): The right ones.
        actual (Detections): As many others.
        size (tuple[int, int]): (h, w) of the image.

    Returns:
        Difference: Scores are compared rank by rank. Each expected box is compared with the
        nearest of its label; those whose score is the lowest kept, where rounding decides which
        come along, are left out.
    """
    scores = float(np.abs(expected.scores - actual.scores).max(initial=0.0))
    sides = np.array([size[1], size[0]] * 2, np.float32)
    boxes = 0.0
    lowest = expected.scores.min(initial=1.0) + 2 * scores
    for box, score, label in zip(*expected):
        if score <= lowest and len(expected.scores) > 1:
            continue
        others = actual.boxes[actual.labels == label]
        distances = (np.abs(others - box) / sides).max(1)
        boxes = max(boxes, float(distances.min(initial=1.0)))
    return Difference(boxes, scores)


def _milliseconds(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 1)
