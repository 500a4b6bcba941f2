"""A detector of MMDetection in PyTorch, run as an exported one is."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from ..models import use_schedule
from ..openmmlab.build import DetectorSpec, build_detector, load_config
from ..openmmlab.detectors.grounding_dino import check_names
from ..openmmlab.families import reads_text
from .compare import predict
from .detector import Detector
from .pipeline import class_names, preprocessing
from .runtimes import check_device, check_threads

# Parts of some detectors, such as DDQ-DETR's, speak through the model while it predicts, and models
# may share modules. So one predicts at a time, on all threads of torch.
_TURN = threading.Lock()


class PyTorchSession:
    """A detector of MMDetection as the session of a :class:`~.detector.Detector`."""

    def __init__(self, model: nn.Module, text: Sequence[str] | None, schedule: str | None) -> None:
        self.model, self.text, self.schedule = model, text, schedule

    def __call__(self, images: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        with _TURN:
            if self.schedule is not None:
                use_schedule(self.model, self.schedule)
            try:
                found = predict(self.model, images, np.asarray(sizes).tolist(), self.text)
            except RuntimeError as error:
                if 'selected index k out of range' not in str(error):
                    raise
                size = ' x '.join(map(str, images.shape[2:]))
                raise ValueError(f'an image of {size} pixels is too small for the model') from error
        pairs = zip(zip(*found), (0, -1, 0, False, 0))  # what there is not scores -1
        return [_stacked(arrays, fill) for arrays, fill in pairs if arrays[0] is not None]


def _stacked(arrays: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Arrays in one, filled up at the end of every axis."""
    shape = np.max([array.shape for array in arrays], axis=0)
    whole = np.full((len(arrays), *shape), fill, arrays[0].dtype)
    for one, array in zip(whole, arrays):
        one[tuple(map(slice, array.shape))] = array
    return whole


def pytorch_detector(model: nn.Module, config: Config, schedule: str | None = None) -> Detector:
    """A built detector of MMDetection, with the methods of an exported one.

    ``config`` says how images are prepared; ValueError where :class:`~.detector.Detector` does not
    do so. ``schedule`` is one of those that an elastic model was trained with.
    """
    head = getattr(model, 'bbox_head', None) or getattr(model, 'panoptic_head', None)
    count = None if reads_text(model) else getattr(head, 'num_classes', None)
    classes = class_names(config, model, count)
    text = classes if reads_text(model) else None
    if text:
        check_names(model, text)
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    inputs = {'batch': None, 'height': None, 'width': None, 'padded': True, 'divisor': divisor}
    inputs |= {'levels': [], 'least_tokens': 0}
    description = {'format': 'pytorch', 'detector': type(model).__name__, 'classes': classes}
    description |= {'input': inputs, 'preprocessing': preprocessing(config)}
    session = PyTorchSession(model, text, schedule)
    return Detector(session, description)


def load_pytorch(
    config: str, checkpoint: str | None, device: str, threads: int | None, changes: dict | None
) -> Detector:
    """Build the detector of a config and a checkpoint; see :func:`mmlite.load`."""
    check_device(device)
    check_threads(threads)
    spec = DetectorSpec(config, checkpoint) if checkpoint else DetectorSpec.parse(config)
    cfg = load_config(spec.config, changes)
    if spec.checkpoint is None:
        name = spec.config
        raise ValueError(f'{name} comes without weights; add its checkpoint: {name},FILE.pth')
    if threads:
        torch.set_num_threads(threads)
    return pytorch_detector(build_detector(cfg, spec.checkpoint, device), cfg)
