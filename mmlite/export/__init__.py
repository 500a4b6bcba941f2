"""Detectors outside PyTorch: exported to ONNX, OpenVINO and torch.export, and loaded without torch.

    from mmlite.export import load

    detector = load('lite-dino-onnx')
    boxes, scores, labels = detector.detect('image.jpg')

Importing this loads nothing; :func:`load` needs NumPy, OpenCV and the runtime of the model, and
only :func:`export_detector` and :func:`optimize` need torch and MMDetection.
"""

from __future__ import annotations

import importlib
from typing import Any

# Name -> the module it is in.
_HOMES = {
    'Detections': 'detector',
    'Detector': 'detector',
    'Segmentations': 'detector',
    'load': 'detector',
    'read_image': 'detector',
    'draw': 'drawing',
    'library': 'runtimes',
    'openvino_core': 'runtimes',
    'export_detector': 'write',
    'optimize': 'inference',
    'quantize': 'int8',
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_HOMES[name]}', __name__), name)
