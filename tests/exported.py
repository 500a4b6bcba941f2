"""What tests of exported detectors share."""

from __future__ import annotations

import pytest

from mmlite.export import library

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
