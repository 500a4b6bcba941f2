"""Families in every format: a stock DETR, and what holds more: suppression, a text, masks."""

from __future__ import annotations

import pytest
import torch
from exported import assert_runs_alone, batch_of, export_for_all, needs

from mmlite.export import load
from mmlite.export.families import make_graph
from mmlite.export.nms import distinct_boxes
from mmlite.export.program import trace
from mmlite.export.write import compare, describe, difference, predict, write_program

pytest.importorskip('onnxscript')
pytestmark = pytest.mark.timeout(900)

TEXT = ('red circle', 'green square', 'square')
FAMILIES = ('DINO', 'LiteDDQDETR with a key-aware decoder', 'LiteGroundingDINO')


@pytest.fixture(scope='module', params=FAMILIES)
def family(request, detector, tmp_path_factory):
    """A detector, and a folder with its export for each runtime, for padded batches."""
    text = TEXT if 'Grounding' in request.param else None
    model = detector(request.param)
    folder = tmp_path_factory.mktemp('family') / 'exported'
    export_for_all(model, folder, batch=None, text=text)
    return model, folder, text


@pytest.mark.parametrize('format_', ['onnx', 'openvino', 'torch'])
def test_agrees_with_pytorch(family, format_, images, tmp_path):
    needs(format_)
    model, folder, text = family
    exported = load(folder / format_)
    report = compare(model, exported, images, repeats=1)
    assert report['boxes'] < 1e-4 and report['scores'] < 1e-4, report
    canvas, sizes = batch_of(images)
    expected, actual = predict(model, canvas, sizes, text), exported.detect_batch(images)
    assert len(actual) == len(images)
    for one, other in zip(expected, actual):
        assert max(difference(one, other, canvas.shape[-2:])) < 1e-4
    assert exported.detect_batch([]) == []
    if format_ != 'torch':
        assert_runs_alone(exported, folder / format_, images[0], tmp_path)


def test_masks(detector, images, tmp_path):
    """Of the right shapes. Their pixels are compared in test_graph.py: where a query attends is cut
    at one half, layer after layer, and with random weights many pixels are near it."""
    needs('openvino')
    model = detector('LiteMask2Former panoptic')
    program = trace(model, batch=None, padded=True)
    for format_ in ('openvino', 'torch'):
        write_program(program, tmp_path / format_, format_, describe(model, batch=None))
    report = compare(model, load(tmp_path / 'torch'), images, repeats=1)
    assert max(report[name] for name in ('boxes', 'scores', 'masks')) < 1e-4, report
    found = load(tmp_path / 'openvino').detect(images[0])
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
