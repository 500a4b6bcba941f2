"""``mmlite tune``: choices, the front, the budget, and what is written."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from commands import mmlite, refused
from small_detectors import batch, small_model, write_pair

from mmlite.analysis.timing import Timing
from mmlite.analysis.tune import (
    Choice,
    agreement,
    choose,
    front,
    with_decoder_layers,
    with_image_size,
)
from mmlite.export.detector import Detections
from mmlite.export.pytorch import pytorch_detector
from mmlite.openmmlab.build import build_detector, load_config

ELASTIC = ['H3L1-(1+1)x2', 'H3L1-(2+1)x1', 'H2L2-(2+1)x1']


def choice(seconds: float, accuracy: float) -> Choice:
    made = Choice('H3L1-(2+1)x3', (64, 96), 6, accuracy=accuracy)
    made.timings = {'inference': {1: Timing((seconds,))}}
    return made


def test_front_and_budget():
    found = ((3, 50), (1, 30), (2, 20), (2.5, 45), (1, 28), (4, 50))
    points = [choice(*each) for each in found]
    assert [(p.seconds, p.accuracy) for p in front(points)] == [(1, 30), (2.5, 45), (3, 50)]
    assert choose(points, 2.5).accuracy == 45 and choose(points, 2.49).accuracy == 30
    with pytest.raises(ValueError, match=r'nothing runs within 900 ms; the nearest is .* 1000 ms'):
        choose(points, 0.9)


def test_agreement_by_hand():
    def found(*rows):
        boxes, scores, labels = zip(*rows) if rows else ((), (), ())
        return Detections(np.array(boxes, float).reshape(-1, 4), np.array(scores), np.array(labels))

    wanted = found(([0, 0, 10, 4], 0.9, 1), ([20, 20, 30, 40], 0.5, 0))
    assert agreement([wanted], [wanted]) == 100
    moved = found(([0, 2, 10, 6], 0.9, 1), ([20, 20, 30, 40], 0.5, 0))  # IoU 1/3
    assert agreement([wanted], [moved]) == 50
    half = found(([0, 0, 10, 8], 0.9, 1), ([20, 20, 30, 40], 0.5, 1))  # IoU 1/2, another class
    assert agreement([wanted], [half]) == 50
    assert agreement([wanted], [found()]) == 0


@pytest.mark.parametrize('name', ['plain', 'two-stage', 'DINO', 'Mask2Former'])
def test_fewer_decoder_layers(name):
    """The first layers alone are what the model says after them; the model itself stays whole."""
    model = small_model(name, {'schedule': '-(2+1)x1'}, std=0.1).eval()
    head = model.bbox_head if hasattr(model, 'bbox_head') else model.panoptic_head
    outputs = []
    cut = with_decoder_layers(model, 1)
    cut_head = cut.bbox_head if hasattr(cut, 'bbox_head') else cut.panoptic_head
    data = batch(model, padded=False)
    for one, part in ((model, head), (cut, cut_head)):
        with part.register_forward_hook(lambda m, a, out: outputs.append(out)), torch.no_grad():
            one(**data, mode='predict')
    layers = len(outputs[0][0]) - len(outputs[1][0])
    assert layers == 1
    kept = len(outputs[1][0])
    for whole, short in zip(outputs[0][:2], outputs[1][:2]):
        for layer in range(kept):
            torch.testing.assert_close(short[layer], whole[layer])
    with pytest.raises(ValueError, match='the decoder has 2 layers; 3 of them'):
        with_decoder_layers(model, 3)


@pytest.fixture(scope='module')
def user(tmp_path_factory):
    """An elastic detector's config and weights, and images."""
    folder = tmp_path_factory.mktemp('user')
    encoder = {'model.encoder.schedule': ELASTIC[0], 'model.encoder.elastic': ELASTIC}
    _, lite = write_pair(folder, 'DINO')
    config = load_config(lite, encoder)
    config.dump(lite)
    torch.save({'state_dict': build_detector(config).state_dict()}, folder / 'lite.pth')
    (folder / 'images').mkdir()
    for index in range(2):
        image = np.random.default_rng(index).integers(0, 255, (60, 90, 3), np.uint8)
        cv2.imwrite(str(folder / f'images/{index}.png'), image)
    return folder, lite


def tune(user, out, *options) -> list:
    """The words of the command."""
    folder, lite = user
    words = ['tune', lite, folder / 'lite.pth', '--images', folder / 'images', '-o', out]
    return [*words, '--image-size', 64, 96, '--rounds', 2, '--threads', 1, *options]


def test_the_command(user, tmp_path):
    sizes = ('--image-size', '96', '128', '--decoder-layers', '2', '--decoder-layers', '1')
    report = tmp_path / 'report.json'
    output = mmlite(*tune(user, tmp_path, *sizes, '--budget', '60s', '--json', report))
    found = json.loads(report.read_text())['results']
    choices = {tuple(map(str, list(each.values())[:4])) for each in found}
    assert len(choices) == 3 * 2 * 2
    assert found[0]['accuracy'] == 100 and found[0]['schedule'] == ELASTIC[0]
    assert 'Chosen: ' in output and (tmp_path / 'front.png').stat().st_size > 5000
    assert 'data:image/png' in (tmp_path / 'report.html').read_text()
    config = load_config(str(tmp_path / 'tuned.py'))
    model = build_detector(config, config.load_from)
    image = cv2.imread(str(user[0] / 'images/0.png'))
    encoder, pipeline = config.model.encoder, config.test_dataloader.dataset.pipeline
    size, layers = pipeline[1].scale[::-1], config.model.decoder.num_layers
    assert ([*size], layers) in [(each['image_size'], each['decoder_layers']) for each in found]
    written = pytorch_detector(model, config).detect(image)
    whole = load_config(user[1])
    cut = with_decoder_layers(build_detector(whole, str(user[0] / 'lite.pth')), layers)
    expected = pytorch_detector(cut, with_image_size(whole, size), encoder.schedule)
    np.testing.assert_allclose(written.scores, expected.detect(image).scores, rtol=1e-5)


@pytest.mark.parametrize(
    ('options', 'problem'),
    [
        (['--budget', 'soon'], 'write for example 300ms'),
        (['--budget', '0.001ms'], 'nothing runs within'),
        (['--int8'], '8 bits are for OpenVINO'),
        (['--decoder-layers', '9'], 'the decoder has 2 layers'),
        (['--annotations', 'a.json'], 'go together'),
    ],
)
def test_bad_input_is_refused(user, tmp_path, options, problem):
    refused(problem, *tune(user, tmp_path, *options))


def test_exports_for_a_runtime(user, tmp_path):
    pytest.importorskip('onnxruntime')
    output = mmlite(*tune(user, tmp_path, '--runtime', 'onnxruntime', '--budget', '60s'))
    assert len(list(tmp_path.glob('exports/*/detector.json'))) == 3
    assert 'Export: ' in output
