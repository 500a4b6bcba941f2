"""Compare an exported detector with PyTorch."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn

from ..models import Change
from .detector import Detections, Detector, Segmentations, detections_of
from .pipeline import prepare

REPORT = 'report.json'


class Difference(NamedTuple):
    """How far an exported detector is from PyTorch: the largest differences."""

    boxes: float  # of a side of a box, in parts of the image's side
    scores: float
    masks: float = 0.0  # part of the pixels of a mask, or of a panoptic map


def compare(
    model: nn.Module,
    detector: Detector,
    images: Sequence[np.ndarray],
    config: Config | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Run PyTorch and the exported detector on the same images, as ``cv2.imread`` gives them.

    The test pipeline of ``config`` prepares them for PyTorch, unless the detector fits them into a
    canvas. Without a config the detector prepares them for both.

    Returns:
        dict: ``boxes``, ``scores`` and ``masks`` of the largest :class:`Difference`; ``latency_ms``
        of both, the model alone on the first image: the fastest of ``repeats`` runs, the first of
        which is the comparison itself. None begins after two seconds.
    """
    text = detector.description.get('text', {}).get('names')
    if 'canvas' in (detector.description['preprocessing']['resize'] or {}):
        config = None
    differences = []
    for image in images[::-1]:
        content = detector.preprocess(image)
        canvas, *sizes = detector.arguments_of(image)
        size = content.shape[1:]
        start = time.perf_counter()
        outputs = detector.session(canvas, *sizes)
        ours, found = time.perf_counter() - start, detections_of(outputs, 0, size)
        expected_canvas = canvas
        if config is not None:
            wanted, factors = prepare(config, image)
            factor = np.divide(detector.resized_size(image), image.shape[:2])[::-1]
            if wanted.shape == content.shape and np.allclose(factors, factor):
                expected_canvas = canvas.copy()
                expected_canvas[0, :, : size[0], : size[1]] = wanted
            else:
                differences.append(Difference(1.0, 1.0, 1.0))
        start = time.perf_counter()
        (expected,) = predict(model, expected_canvas, [size], text)
        theirs = time.perf_counter() - start
        differences.append(difference(expected, found, canvas.shape[-2:]))

    def milliseconds(first: float, function: Callable[[], Any]) -> float:
        times = [first]
        while len(times) < repeats and sum(times) < 2:
            times.append(timeit.timeit(function, number=1))
        return round(min(times) * 1e3, 1)

    kind = detector.description['format']
    return {
        **Difference(*map(max, zip(*differences)))._asdict(),
        'images': len(images),
        'latency_ms': {
            'pytorch': milliseconds(theirs, lambda: predict(model, canvas[:1], [size], text)),
            kind: milliseconds(ours, lambda: detector.session(canvas, *sizes)),
        },
        'batch': len(canvas),
        'threads': torch.get_num_threads(),
    }


def predict(
    model: nn.Module, images: np.ndarray, sizes: Sequence, text: Sequence[str] | None = None
) -> list[Detections | Segmentations]:
    """MMDetection's own predictions, in pixels of ``images``.

    ``images`` are as the exported model takes them, ``sizes`` (h, w) of each without padding.
    """
    device = next(model.parameters()).device
    batch = torch.zeros(len(sizes), *images.shape[1:], device=device)
    shape = images.shape[-2:]
    samples = []
    for number, (height, width) in enumerate(sizes):
        content = torch.from_numpy(images[number, :, :height, :width].copy())
        inputs = model.data_preprocessor({'inputs': [content]})['inputs'][0]
        batch[number, :, :height, :width] = inputs[:, :height, :width]
        meta = {'img_shape': (height, width), 'ori_shape': (height, width)}
        meta |= {'batch_input_shape': shape, 'pad_shape': shape, 'scale_factor': (1.0, 1.0)}
        if text is not None:
            meta |= {'text': tuple(text), 'custom_entities': True}
        samples.append(DetDataSample(metainfo=meta))
    change = Change('predict')
    fusion = getattr(model, 'panoptic_fusion_head', None)
    if fusion is not None:  # it may return panoptic maps alone
        test_cfg = {**(fusion.test_cfg or {}), 'instance_on': True}
        change.set(model, 'panoptic_fusion_head', 'test_cfg', test_cfg)
    try:
        with torch.inference_mode():
            return [_found(sample) for sample in model.predict(batch, samples, rescale=False)]
    finally:
        change.undo(model)


def _found(sample: DetDataSample) -> Detections | Segmentations:
    found = sample.pred_instances.numpy()
    if 'masks' not in found:
        return Detections(found.bboxes, found.scores, found.labels)
    found = found[np.argsort(-found.scores, kind='stable')]  # MMDetection does not sort these
    panoptic = sample.get('pred_panoptic_seg')
    maps = [found.masks, *([] if panoptic is None else [panoptic.sem_seg[0].cpu().numpy()])]
    return Segmentations(found.bboxes, found.scores, found.labels, *maps)


def difference(
    expected: Detections | Segmentations, actual: Detections | Segmentations, size: Sequence[int]
) -> Difference:
    """Compare what was found in an image of ``size`` (h, w).

    Scores are compared rank by rank. The order may differ where scores are equal, so an expected
    box is compared with the nearest of its label, or the one with the nearest mask. Rounding
    decides which come along with the lowest score that is kept, so these are left out.
    """
    has_masks = isinstance(expected, Segmentations)
    if len(expected.scores) != len(actual.scores):
        return Difference(1.0, 1.0, 1.0)
    scores = float(np.abs(expected.scores - actual.scores).max(initial=0.0))
    sides = np.array([size[1], size[0]] * 2, np.float32)
    lowest = expected.scores.min(initial=1.0) + 2 * scores
    boxes = masks = 0.0
    for rank, (box, score, label) in enumerate(zip(*expected[:3])):
        if score <= lowest and len(expected.scores) > 1:
            continue
        same = actual.labels == label
        if not same.any():
            return Difference(1.0, scores, float(has_masks))
        moved = differs = (np.abs(actual.boxes[same] - box) / sides).max(1)
        if has_masks:
            mask = expected.masks[rank]
            differs = (actual.masks[same] != mask).sum((1, 2)) / max(int(mask.sum()), 1)
            masks = max(masks, float(differs.min()))
        boxes = max(boxes, float(moved[differs.argmin()]))
    if getattr(expected, 'panoptic', None) is not None:
        masks = max(masks, float((expected.panoptic != actual.panoptic).mean()))
    return Difference(boxes, scores, masks)
