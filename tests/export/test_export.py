"""Exported detectors: PyTorch's boxes, sizes of all kinds, and no torch where they run."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from exported import assert_runs_alone, export_for_all, needs
from small_detectors import SMALL

from mmlite.cli import main
from mmlite.export import export_detector, load
from mmlite.export.detector import resized_size
from mmlite.export.write import compare

pytest.importorskip('onnxscript')

# Tracing takes half a minute on a quiet machine, and several on a busy one.
pytestmark = pytest.mark.timeout(900)


def assert_agrees(model, detector, images) -> None:
    report = compare(model, detector, images, repeats=1)
    assert max(report['boxes'], report['scores']) < 1e-4, report


@pytest.fixture(scope='module')
def any_size(detector, tmp_path_factory):
    """A detector, and a folder with its export for each runtime."""
    model = detector('LiteDINO with a key-aware decoder')
    folder = tmp_path_factory.mktemp('any_size') / 'exported'
    export_for_all(model, folder)
    return model, folder


@pytest.mark.parametrize('format_', ['onnx', 'openvino'])
def test_any_size_without_torch(format_, any_size, images, tmp_path):
    needs(format_)
    model, folder = any_size
    exported = load(folder / format_)
    assert_agrees(model, exported, images)
    assert exported.description['schedule'] == 'H3L1-(2+1)x1'

    assert_runs_alone(exported, folder / format_, images[0], tmp_path)
    found = exported.detect(images[0])
    threshold = float(found.scores[3])
    confident = exported.detect(images[0], threshold)
    assert 4 <= len(confident.scores) < len(found.scores)
    assert confident.scores.min() >= threshold


def test_a_fixed_canvas_and_batch(detector, images, tmp_path):
    model = detector('LiteDeformableDETR')
    exported = export_detector(model, tmp_path, 'torch', size=(192, 256), batch=2)
    assert_agrees(model, exported, images)
    shapes = [exported.preprocess(image).shape[1:] for image in images]
    assert shapes == [(192, 250), (192, 154), (192, 192)]
    # The third image makes a batch of its own, filled up.
    assert len(exported.detect_batch(images)) == 3


def test_portable(detector, images, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    # No library is looked for.
    monkeypatch.setattr('mmlite.export.runtimes._SUFFIX', 'nothing')
    model = detector('LiteDINO with a key of its own')
    exported = export_detector(model, tmp_path, size=(128, 128), portable=True)
    assert_agrees(model, exported, images[:1])


def test_command(images, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        "_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py'\n"
        f'model = {SMALL!r}\n'
        "test_dataloader = dict(dataset=dict(metainfo=dict(classes=('a', 'b', 'c', 'd', 'e'))))\n"
    )
    cv2.imwrite(str(tmp_path / 'image.png'), images[0])
    arguments = ['export', str(config), '--format', 'torch', '-o', str(tmp_path / 'exported')]
    options = ['--size', '160', '160', '--images', str(tmp_path / 'image.png')]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / 'exported/report.json').read_text())
    assert report['boxes'] < 1e-4 and set(report['latency_ms']) == {'pytorch', 'torch'}
    assert load(tmp_path / 'exported').classes == ['a', 'b', 'c', 'd', 'e']

    for options, sentence in (
        (['--batch', 'many'], "--batch must be a number of images or 'any'; got 'many'"),
        (['--images', str(config)], 'cannot be read as an image'),
        (['--opset', '9', '--format', 'onnx', '--size', '160', '160'], 'opset 9 is not supported'),
    ):
        result = CliRunner().invoke(main, [*arguments, *options])
        assert result.exit_code == 1 and sentence in result.output.replace('\n', ' ')


def test_sizes_are_those_of_mmdetection():
    mmcv = pytest.importorskip('mmcv')
    resize = {'scale': [1333, 800], 'keep_ratio': True}
    for size in [(480, 640), (427, 640), (333, 500), (1080, 1920), (2000, 37), (801, 1333)]:
        expected = mmcv.imrescale(np.zeros((*size, 3), np.uint8), (1333, 800)).shape[:2]
        assert resized_size(size, resize) == expected
    assert resized_size((10, 20), None) == (10, 20)
    assert resized_size((10, 20), {'scale': [30, 40], 'keep_ratio': False}) == (40, 30)


def test_refusals(detector, images, tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no exported detector'):
        load(tmp_path)
    (tmp_path / 'detector.json').write_text('{"version": 0}')
    with pytest.raises(ValueError, match='another version of mmlite'):
        load(tmp_path)
    model = detector('DINO')
    with pytest.raises(ValueError, match='format must be one of onnx, openvino, torch'):
        export_detector(model, tmp_path, 'tflite')
