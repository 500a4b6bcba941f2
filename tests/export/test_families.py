"""Families whose graphs hold more than a DETR: suppression, a text, masks; in both runtimes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import assert_runs_alone, needs

from mmlite.export import load
from mmlite.export.families import make_graph
from mmlite.export.nms import distinct_boxes
from mmlite.export.program import trace
from mmlite.export.write import compare, describe, write_program

pytest.importorskip('onnxscript')
pytestmark = pytest.mark.timeout(900)

TEXT = ('red circle', 'green square', 'square')
FAMILIES = ('LiteDDQDETR with a key-aware decoder', 'LiteGroundingDINO')
RUNTIMES = pytest.mark.parametrize('format_', ['onnx', 'openvino'])


@pytest.fixture(scope='module', params=FAMILIES)
def family(request, detector, tmp_path_factory):
    """A detector, and its export for each runtime, from one tracing."""
    name = request.param
    text = TEXT if 'Grounding' in name else None
    model = detector(name)
    description = describe(model, batch=None, text=text)
    program = trace(model, batch=None, padded=True, text=text)
    folder = tmp_path_factory.mktemp('family')

    def export(format_: str):
        needs(format_)
        if not (folder / format_).exists():
            write_program(program, folder / format_, format_, description)
        return model, load(folder / format_), folder / format_

    return export


@RUNTIMES
def test_agrees_with_pytorch(family, format_, images):
    model, exported, _ = family(format_)
    report = compare(model, exported, images, repeats=1)
    assert report['boxes'] < 1e-4 and report['scores'] < 1e-4, report
    # A padded batch says what each image says in it alone, in its own canvas.
    for found in exported.detect_batch(images):
        assert np.isfinite(found.boxes).all() and len(found.scores)


@RUNTIMES
def test_runs_without_torch(family, format_, images):
    _, exported, folder = family(format_)
    assert_runs_alone(exported, folder, images[0])


def test_masks(detector, images, tmp_path):
    """Of the right shapes. Their pixels are compared in test_graph.py: where a query attends is cut
    at one half, layer after layer, and with random weights many pixels are near it."""
    needs('openvino')
    model = detector('LiteMask2Former panoptic')
    program = trace(model, batch=None, padded=True)
    write_program(program, tmp_path, 'openvino', describe(model, batch=None))
    found = load(tmp_path).detect(images[0])
    assert found.masks.shape[1:] == found.panoptic.shape == images[0].shape[:2]
    assert found.masks.dtype == bool and len(found.scores) == len(found.masks) == len(found.boxes)


def test_the_text_is_described(detector):
    description = describe(detector('GroundingDINO'), text=TEXT)
    assert description['classes'] == list(TEXT)
    assert description['text']['prompt'].startswith('red circle. green square.')


def test_distinct_boxes():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 9, 10]]])
    scores = torch.tensor([[0.5, 0.9, 0.1, -1.0]])
    kept = distinct_boxes(boxes, scores, 0.8, 10)
    assert kept.tolist() == [[False, True, True, False]]
    assert distinct_boxes(boxes, scores, 0.8, 1).tolist() == [[False, True, False, False]]
    # Of boxes with one score the first is kept; every runtime has to do so.
    alike = torch.tensor([[[0.0, 0, 10, 10]] * 3])
    kept = distinct_boxes(alike, torch.full((1, 3), 0.5), 0.8, 10)
    assert kept.tolist() == [[True, False, False]]
    with pytest.raises(ValueError, match=r'scores \(B, N\)'):
        distinct_boxes(boxes, scores[0], 0.8, 10)


def test_refusals(detector):
    model = detector('DDQDETR')
    model.dqs_cfg = dict(type='soft_nms', iou_threshold=0.8)
    with pytest.raises(ValueError, match=r"dict\(type='nms', iou_threshold=...\)"):
        make_graph(model)
    with pytest.raises(ValueError, match='DINO takes no text'):
        make_graph(detector('DINO'), TEXT)
    model = detector('GroundingDINO')
    with pytest.raises(ValueError, match='needs a text'):
        make_graph(model)
    model.test_cfg = dict(chunked_size=40)
    with pytest.raises(ValueError, match='reads its text in parts'):
        make_graph(model, TEXT)
    model = detector('Mask2Former')
    with pytest.raises(ValueError, match='pads images to multiples of 32'):
        trace(model, size=(100, 128), padded=True)
    model.panoptic_head.pixel_decoder = torch.nn.Identity()
    with pytest.raises(ValueError, match='its pixel_decoder is Identity'):
        make_graph(model)
