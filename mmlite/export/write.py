"""Write a detector for an inference runtime, describe it, and compare it with PyTorch."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.models.detectors import GroundingDINO
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn

from .. import __version__
from .detector import (
    DESCRIPTION,
    FORMAT_VERSION,
    Detections,
    Detector,
    Segmentations,
    load,
)
from .families import encoder_of, make_graph, padding_divisor
from .grounding_dino import GroundingGraph
from .mask2former import SegmenterGraph
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
        masks (float): Largest part of the pixels of a mask, or of a panoptic map, that differs.
    """

    boxes: float
    scores: float
    masks: float = 0.0


def export_detector(
    model: nn.Module,
    folder: str | os.PathLike,
    format: str = 'onnx',
    config: Config | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    portable: bool = False,
    opset: int = 18,
    text: Sequence[str] | None = None,
) -> Detector:
    """Write a detector, from image to boxes, scores and labels, and load it again.

    Args:
        model (nn.Module): A detector of MMDetection or mmlite: Deformable DETR, DINO,
            H-Deformable-DETR, DDQ-DETR, Grounding DINO or Mask2Former, stock or Lite.
        folder (str | PathLike): Where ``model.*`` and ``detector.json`` go.
        format (str): ``'onnx'``, ``'openvino'`` or ``'torch'`` (torch.export).
        config (Config, optional): Where the names of the classes and the test pipeline's
            ``Resize`` are read.
        size (tuple[int, int], optional): (h, w) of the canvas that images are fitted into; None
            for images of any size.
        batch (int, optional): Images at a time; None for any number.
        portable (bool): Use no operators of ours: slower, for runtimes that take none.
        opset (int): Version of ONNX's operators.
        text (Sequence[str], optional): What Grounding DINO looks for, one name a class; by default
            the classes of ``config``.

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
    if text is None and isinstance(model, GroundingDINO):
        text = class_names(config, model)
    description = describe(model, config, size, batch, portable, text)
    program = trace(model, size, batch, description['input']['padded'], portable, text)
    return write_program(program, folder, format, description, opset)


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
    from .runtimes import library, openvino_core

    core = openvino_core(None if portable else library('openvino'))
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
    text: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What ``detector.json`` says, but for the file; arguments as in :func:`export_detector`."""
    preprocessor = model.data_preprocessor
    normalises = getattr(preprocessor, '_enable_normalize', False)
    resize = _resize(config)
    if size is not None:
        resize = {'canvas': list(size)}
    schedule = getattr(encoder_of(model), 'schedule', None)
    graph = make_graph(model, text)
    divisor = padding_divisor(model)
    described = {
        'version': FORMAT_VERSION,
        'mmlite': __version__,
        'detector': type(model).__name__,
        'schedule': None if schedule is None else str(schedule),
        'classes': list(text or class_names(config, model, graph.num_classes)),
        'num_predictions': graph.num_predictions,
        'outputs': list(graph.outputs),
        'portable': portable,
        'input': {
            'batch': batch,
            'height': size and size[0],
            'width': size and size[1],
            # A single image of any size is never padded, and then nothing need be masked.
            'padded': batch != 1 or size is not None or divisor > 1,
            'divisor': divisor,
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
    if isinstance(graph, GroundingGraph):
        # Fixed in the model: another text needs another export.
        described['text'] = {'prompt': graph.prompt, 'names': list(graph.text)}
    if isinstance(graph, SegmenterGraph):
        described['num_things'] = model.num_things_classes
    return described


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


def class_names(
    config: Config | None, model: nn.Module | None = None, count: int | None = None
) -> list[str]:
    """Names of the classes: what a checkpoint told the model, the config's, the data set's.

    Args:
        config (Config, optional): Whose test data set is asked.
        model (nn.Module, optional): What is asked first.
        count (int, optional): How many there must be.

    Returns:
        list[str]: The first names that are as many; else numbers, or none without ``count``.
    """
    dataset = (config or {}).get('test_dataloader', {}).get('dataset', {})
    kind = DATASETS.get(dataset.get('type', '')) if dataset else None
    for meta in (
        getattr(model, 'dataset_meta', None),
        dataset.get('metainfo'),
        getattr(kind, 'METAINFO', None),
    ):
        names = (meta or {}).get('classes', ())
        if names and not isinstance(names, str) and len(names) == (count or len(names)):
            return list(names)
    return [str(label) for label in range(count or 0)]


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
    text = detector.description.get('text', {}).get('names')
    worst = Difference(0.0, 0.0)
    for image in images:
        arguments, size = detector.arguments_of(image)
        outputs = detector.session(*arguments)
        expected = predict(model, arguments[0], [size], text)[0]
        found = difference(expected, detections_of(outputs, 0, size), arguments[0].shape[-2:])
        worst = Difference(*map(max, worst, found))
    arguments, size = detector.arguments_of(images[0])
    kind = detector.description['format']
    return {
        **worst._asdict(),
        'images': len(images),
        'latency_ms': {
            'pytorch': _milliseconds(
                lambda: predict(model, arguments[0][:1], [size], text), repeats
            ),
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


def detections_of(
    outputs: Sequence[np.ndarray], number: int, size: tuple[int, int]
) -> Detections | Segmentations:
    """What a session says of one image of a batch.

    Args:
        outputs (Sequence[np.ndarray]): What ``Detector.session`` returned.
        number (int): Which image.
        size (tuple[int, int]): (h, w) of it, without padding.

    Returns:
        Detections | Segmentations: In pixels of the batch.
    """
    boxes, scores, labels, *maps = (output[number] for output in outputs)
    if not maps:
        return Detections(boxes, scores, labels)
    things = scores >= 0
    height, width = size
    return Segmentations(
        boxes[things],
        scores[things],
        labels[things],
        maps[0][things, :height, :width],
        *(segments[:height, :width] for segments in maps[1:]),
    )


def predict(
    model: nn.Module,
    images: np.ndarray,
    sizes: Sequence[tuple[int, int]],
    text: Sequence[str] | None = None,
) -> list[Detections | Segmentations]:
    """MMDetection's own predictions.

    Args:
        model (nn.Module): The detector.
        images (np.ndarray): As the exported model takes them: padded, float32, BGR, shape
            (bs, 3, h, w).
        sizes (Sequence[tuple[int, int]]): (h, w) of each without padding.
        text (Sequence[str], optional): What Grounding DINO looks for.

    Returns:
        list[Detections | Segmentations]: In pixels of ``images``, one an image.
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
        if text is not None:
            samples[-1].set_metainfo(dict(text=tuple(text), custom_entities=True))
    with torch.inference_mode(), _instances_on(model):
        results = model.predict(batch[: len(sizes)], samples, rescale=False)
    found: list[Detections | Segmentations] = []
    for result in results:
        names = ('bboxes', 'scores', 'labels')
        fields = [result.pred_instances[name].numpy() for name in names]
        if 'masks' not in result.pred_instances:
            found.append(Detections(*fields))
            continue
        # MMDetection does not sort these.
        best_first = np.argsort(-fields[1], kind='stable')
        fields.append(result.pred_instances.masks.numpy())
        panoptic = result.get('pred_panoptic_seg')
        found.append(
            Segmentations(
                *(field[best_first] for field in fields),
                None if panoptic is None else panoptic.sem_seg[0].numpy(),
            )
        )
    return found


@contextmanager
def _instances_on(model: nn.Module) -> Iterator[None]:
    """A Mask2Former of panoptic maps alone tells its instances, too."""
    head = getattr(model, 'panoptic_fusion_head', None)
    if head is None:
        yield
        return
    config = head.test_cfg
    head.test_cfg = {**(config or {}), 'instance_on': True}
    try:
        yield
    finally:
        head.test_cfg = config


def difference(
    expected: Detections | Segmentations,
    actual: Detections | Segmentations,
    size: tuple[int, int],
) -> Difference:
    """Compare two lists of detections, whose order may differ where scores are equal.

    Args:
        expected (Detections | Segmentations): The right ones.
        actual (Detections | Segmentations): As many others.
        size (tuple[int, int]): (h, w) of the image.

    Returns:
        Difference: Scores are compared rank by rank. Each expected box is compared with the
        nearest of its label, or the one with the nearest mask; those whose score is the lowest
        kept, where rounding decides which come along, are left out.
    """
    if len(expected.scores) != len(actual.scores):
        return Difference(1.0, 1.0, 1.0)
    scores = float(np.abs(expected.scores - actual.scores).max(initial=0.0))
    sides = np.array([size[1], size[0]] * 2, np.float32)
    boxes = masks = 0.0
    lowest = expected.scores.min(initial=1.0) + 2 * scores
    for rank, (box, score, label) in enumerate(zip(*expected[:3])):
        if score <= lowest and len(expected.scores) > 1:
            continue
        same = actual.labels == label
        if not same.any():
            return Difference(1.0, scores, 1.0 if isinstance(expected, Segmentations) else 0.0)
        distances = (np.abs(actual.boxes[same] - box) / sides).max(1)
        nearest = distances.argmin()
        if isinstance(expected, Segmentations) and isinstance(actual, Segmentations):
            mask = expected.masks[rank]
            differ = (actual.masks[same] != mask).sum((1, 2)) / max(int(mask.sum()), 1)
            nearest = differ.argmin()
            masks = max(masks, float(differ[nearest]))
        boxes = max(boxes, float(distances[nearest]))
    maps = [getattr(found, 'panoptic', None) for found in (expected, actual)]
    if all(segments is not None for segments in maps):
        masks = max(masks, float((maps[0] != maps[1]).mean()))
    return Difference(boxes, scores, masks)


def _milliseconds(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 1)
