"""What tests of exported detectors share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmlite.export import Detector, library

# Without torch and all of the framework, as where an exported detector runs.
CLEAN = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'mmdet', 'mmcv', 'mmengine', 'onnx', 'onnxscript'}:
            raise ImportError(f'{name} is blocked')

sys.meta_path.insert(0, Blocked())
import cv2
from mmlite.export import load
found = load(sys.argv[1]).detect(cv2.imread(sys.argv[2]))
print(json.dumps([array.tolist() for array in found if array is not None]))
"""


def assert_runs_alone(exported: Detector, folder: Path, image: np.ndarray) -> None:
    """Without torch and the framework an export finds in an image what it finds here."""
    file = folder / 'image.png'
    cv2.imwrite(str(file), image)
    command = [sys.executable, '-c', CLEAN, folder, file]
    clean = subprocess.run(command, capture_output=True, text=True)
    assert clean.returncode == 0, clean.stderr
    for expected, actual in zip(exported.detect(image), json.loads(clean.stdout)):
        np.testing.assert_allclose(actual, expected, atol=1e-3)


def needs(format_: str) -> None:
    """Skip where the runtime of a format, or its operators, are not there."""
    if format_ == 'torch':
        return
    runtime = {'onnx': 'onnxruntime'}.get(format_, format_)
    pytest.importorskip(runtime)
    try:
        library(runtime)
    except FileNotFoundError as error:
        pytest.skip(str(error))
