"""Compare an exported detector with PyTorch."""

from __future__ import annotations

import platform
import statistics
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn

from .detector import Detections, Detector, Segmentations, detections_of
from .pipeline import prepare
from .runtimes import RUNTIMES

REPORT = 'report.json'


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


def compare(
    model: nn.Module,
    detector: Detector,
    images: Sequence[np.ndarray],
    config: Config | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Run PyTorch and the exported detector on the same images.

    Args:
        model (nn.Module): The detector that was exported, run as MMDetection runs it.
        detector (Detector): What it was exported to.
        images (Sequence[np.ndarray]): As ``cv2.imread`` gives them.
        config (Config, optional): Whose test pipeline prepares the images for PyTorch, unless the
            detector fits them into a canvas. By default the detector prepares them for both.
        repeats (int): Measured runs of the first image; the median counts.

    Returns:
        dict: ``boxes``, ``scores`` and ``masks`` of the largest :class:`Difference`,
        ``latency_ms`` of both (the model alone, on the first image, resized), and versions.
    """
    text = detector.description.get('text', {}).get('names')
    if 'canvas' in (detector.description['preprocessing']['resize'] or {}):
        config = None
    worst = Difference(0.0, 0.0)
    for image in images:
        arguments = detector.arguments_of(image)
        content = detector.preprocess(image)
        size = content.shape[1:]
        found = detections_of(detector.session(*arguments), 0, size)
        canvas = arguments[0]
        if config is not None:
            wanted, factors = prepare(config, image)
            resized = detector.resized_size(image)
            ours = resized[1] / image.shape[1], resized[0] / image.shape[0]
            if wanted.shape != content.shape or not np.allclose(factors, ours, rtol=1e-6):
                worst = Difference(1.0, 1.0, 1.0)
                continue
            canvas = canvas.copy()
            canvas[0, :, : size[0], : size[1]] = wanted
        expected = predict(model, canvas, [size], text)[0]
        worst = Difference(*map(max, worst, difference(expected, found, canvas.shape[-2:])))
    arguments = detector.arguments_of(images[0])
    size = detector.preprocess(images[0]).shape[1:]
    kind = detector.description['format']

    def milliseconds(function) -> float:
        function()
        return round(statistics.median(timeit.repeat(function, number=1, repeat=repeats)) * 1e3, 1)

    return {
        **worst._asdict(),
        'images': len(images),
        'latency_ms': {
            'pytorch': milliseconds(lambda: predict(model, arguments[0][:1], [size], text)),
            kind: milliseconds(lambda: detector.session(*arguments)),
        },
        'batch': len(arguments[0]),
        'threads': torch.get_num_threads(),
        'versions': {
            'python': platform.python_version(),
            'torch': torch.__version__,
            RUNTIMES[kind]: import_module(RUNTIMES[kind]).__version__,
        },
    }


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
