"""What tests of exported detectors share."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from torch import nn

from mmlite.export import Detector, library
from mmlite.export.program import trace
from mmlite.export.runtimes import RUNTIMES
from mmlite.export.write import to_openvino, write

TEXT = ('red circle', 'green square', 'square')

# Less sure than a trained model, so that random weights draw something.
UNSURE = dict(test_cfg=dict(max_per_image=10, object_mask_thr=0.02, iou_thr=0.1))
# So low that some of the queries are suppressed in every layer.
SUPPRESSED = dict(dqs_cfg=dict(type='nms', iou_threshold=0.3))
SCHEDULE = dict(schedule='H3L1-(2+1)x1')
LITE = dict(type='LiteDINO', encoder=SCHEDULE)
H_DETR = dict(num_one2many_queries=20, bbox_head=dict(type='HDeformableDETRHead'))
PIXELS = dict(type='LiteMSDeformAttnPixelDecoder', encoder=dict(schedule='H2L1-(2+1)x1'))
LITE_PIXELS = dict(panoptic_head=dict(pixel_decoder=PIXELS), **UNSURE)


def attending(**attention) -> dict:
    return LITE | dict(encoder=dict(**SCHEDULE, layer_cfg=dict(self_attn_cfg=attention)))


# Name -> small stock config, changes to it.
DETECTORS = {
    'DINO': ('DINO', {}),
    'DeformableDETR': ('plain', {}),
    'DeformableDETR refining': ('refine', {}),
    'DeformableDETR two-stage': ('two-stage', {}),
    'HDeformableDETR': ('two-stage', dict(type='HDeformableDETR', **H_DETR)),
    'LiteDINO': ('DINO', LITE),
    'LiteDINO with a key of its own': ('DINO', attending(proj_key=True)),
    'LiteDINO with the same locations': ('DINO', attending(same_loc=True)),
    'LiteDINO with a key-aware decoder': ('DINO', LITE | dict(decoder=dict(key_aware=True))),
    'LiteDeformableDETR': ('two-stage', dict(type='LiteDeformableDETR', encoder=SCHEDULE)),
    'DDQDETR': ('DDQ', SUPPRESSED),
    'LiteDDQDETR with a key-aware decoder': (
        'DDQ',
        dict(type='LiteDDQDETR', encoder=SCHEDULE, decoder=dict(key_aware=True), **SUPPRESSED),
    ),
    'GroundingDINO': ('GroundingDINO', {}),
    'LiteGroundingDINO': ('GroundingDINO', dict(type='LiteGroundingDINO', encoder=SCHEDULE)),
    'Mask2Former': ('Mask2Former', UNSURE),
    'LiteMask2Former': ('Mask2Former', LITE_PIXELS),
    'LiteMask2Former panoptic': ('panoptic', LITE_PIXELS),
}

# Without torch and all of the framework, as where an exported detector runs.
CLEAN = """
import json, sys

BLOCKED = {'mmdet', 'mmcv', 'mmengine'}
if sys.argv[3] != 'torch':
    BLOCKED |= {'torch', 'onnx', 'onnxscript'}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in BLOCKED:
            raise ImportError(f'{name} is blocked')

sys.meta_path.insert(0, Blocked())
import mmlite
from mmlite.cli import main
command = ['detect', sys.argv[1], sys.argv[2], '--threshold', '0', '-o', sys.argv[4]]
main(command, standalone_mode=False)
found = mmlite.load(sys.argv[1]).detect(sys.argv[2])
print(json.dumps([array.tolist() for array in found if array is not None]))
"""


def batch_of(
    images: list[np.ndarray], divisor: int = 1
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Images at the top left of a canvas full of rubbish, and their sizes."""
    sizes = [image.shape[:2] for image in images]
    height, width = -(-np.max(sizes, axis=0) // divisor) * divisor
    canvas = np.full((len(images), 3, height, width), 300.0, np.float32)
    for number, (h, w) in enumerate(sizes):
        canvas[number, :, :h, :w] = images[number].transpose(2, 0, 1)
    return canvas, sizes


def assert_runs_alone(exported: Detector, folder: Path, image: np.ndarray, tmp_path: Path) -> None:
    """Without torch and the framework an export finds and draws in an image what it finds here."""
    file = tmp_path / 'image.png'
    cv2.imwrite(str(file), image)
    out, kind = tmp_path / 'drawn', exported.description['format']
    command = [sys.executable, '-c', CLEAN, folder, file, kind, out]
    clean = subprocess.run(command, capture_output=True, text=True)
    assert clean.returncode == 0, clean.stderr
    written = json.loads((out / 'results.json').read_text())
    assert len(written) == len(exported.detect(image).scores) and (out / 'image.png').is_file()
    for expected, actual in zip(exported.detect(image), json.loads(clean.stdout.splitlines()[-1])):
        np.testing.assert_allclose(actual, expected, atol=1e-3)


def has_library(runtime: str) -> bool:
    """Whether our operators were built for a runtime."""
    try:
        return library(runtime).exists()
    except FileNotFoundError:
        return False


def needs(format_: str) -> None:
    """Skip where the runtime of a format, or its operators, are not there."""
    if format_ != 'torch':
        pytest.importorskip(RUNTIMES[format_])
        if not has_library(RUNTIMES[format_]):
            pytest.skip(f'the operators for {RUNTIMES[format_]} were not built')


def export_for_all(model: nn.Module, folder: Path, **options) -> None:
    """Export for ONNX Runtime and OpenVINO, where they are, and as a program of torch.

    Each lies in a folder of its format's name. Tracing and writing ONNX is what takes long, so both
    are done once.
    """
    traced = trace(model, **options)
    write(traced, folder / 'torch', 'torch')
    if find_spec('onnxruntime') and has_library('onnxruntime'):
        write(traced, folder / 'onnx', 'onnx')
    if find_spec('openvino') and has_library('openvino'):
        if (folder / 'onnx').exists():
            to_openvino(folder / 'onnx', folder / 'openvino')
        else:
            write(traced, folder / 'openvino', 'openvino')
