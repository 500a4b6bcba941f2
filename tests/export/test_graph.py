"""The whole detector as one function: MMDetection's numbers, with padding and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import DETECTORS, TEXT, batch_of
from mmdet.models.detectors import DINO

from mmlite.export.compare import difference, predict
from mmlite.export.detector import Detections, detections_of
from mmlite.export.graph import DetectorGraph
from mmlite.export.nms import distinct_boxes
from mmlite.export.program import _levels, exportable, make_graph, trace


@pytest.fixture(autouse=True)
def one_thread():
    """Where masks are cut at one half, sums in another order switch pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize('padded', [False, True])
def test_the_graph_is_the_detector(name, padded, detector, images):
    model = detector(name)
    text = TEXT if 'Grounding' in name else None
    canvas, sizes = batch_of(
        images[: 1 + padded], getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    )
    if not padded:
        sizes = [canvas.shape[-2:]]
    expected = predict(model, canvas, sizes, text)
    with exportable(model), torch.inference_mode():
        graph = make_graph(model, text)
        outputs = graph(torch.from_numpy(canvas), torch.tensor(sizes) if padded else None)
    outputs = [output.numpy() for output in outputs]
    assert len(outputs) == len(graph.outputs)
    for number, found in enumerate(expected):
        # The detector says different things.
        if 'Mask2Former' in name:
            assert (found.masks.any(0) != found.masks.all(0)).any()
        else:
            assert np.ptp(found.boxes, 0).max() > 0
        actual = detections_of(outputs, number, sizes[number])
        error = difference(found, actual, canvas.shape[-2:])
        # Mask2Former's layers see what a mask holds: a pixel more or less where its logit is zero.
        tolerance = 1e-4 if 'Mask2Former' in name else 1e-5
        assert max(error) < tolerance, (name, error)


def test_the_model_is_as_it_was(detector):
    model = detector('LiteDINO').train()
    before = [type(module) for module in model.modules()]
    with exportable(model):
        assert not model.training
    assert model.training and model.encoder.low_levels is None
    assert [type(module) for module in model.modules()] == before


# A detector, a part of it, what is changed there, and why it cannot be exported.
REFUSED = [
    ('DINO', 'bbox_head.loss_cls', dict(use_sigmoid=False), 'scores with a softmax'),
    ('DINO', '', dict(encoder=torch.nn.Identity()), 'DINO has no multi-scale encoder; exported'),
    ('DINO', 'encoder', dict(__class__=torch.nn.Module), 'its encoder is Module; that works for'),
    (
        'DINO',
        '',
        dict(__class__=type('Other', (DINO,), {'predict': None})),
        'Other cannot be exported: it has a',
    ),
    (
        'DDQDETR',
        '',
        dict(dqs_cfg=dict(type='soft_nms')),
        'dqs_cfg must be dict',
    ),
    ('DDQDETR', 'decoder', dict(num_layers=1), 'needs two layers to choose distinct queries'),
    ('GroundingDINO', '', dict(test_cfg=dict(chunked_size=40)), 'reads its text in parts'),
    ('GroundingDINO', 'language_model', dict(pad_to_max=True), 'needs pad_to_max=False'),
    ('GroundingDINO', '', {}, 'needs a text'),
    ('Mask2Former', '', dict(panoptic_fusion_head=torch.nn.Identity()), 'fusion_head is Identity'),
    ('Mask2Former', 'panoptic_head.pixel_decoder', dict(num_input_levels=5), '2 maps lie outside'),
]


@pytest.mark.parametrize('name, part, changes, sentence', REFUSED)
def test_refuses_what_it_would_compute_wrongly(name, part, changes, sentence, detector):
    model = detector(name)
    for attribute, value in changes.items():
        setattr(model.get_submodule(part), attribute, value)
    with pytest.raises(ValueError, match=sentence):
        make_graph(model)


def test_refuses_other_models_and_arguments(detector):
    model = detector('DINO')
    with pytest.raises(ValueError, match='Linear has no multi-scale encoder; exported can be Def'):
        make_graph(torch.nn.Linear(1, 1))
    wrapper = torch.nn.Module()
    wrapper.teacher = model
    with pytest.raises(ValueError, match='take the detector inside'):
        make_graph(wrapper)
    with pytest.raises(ValueError, match='DINO takes no text'):
        make_graph(model, TEXT)
    with pytest.raises(ValueError, match='pads images to multiples of 32'):
        trace(detector('Mask2Former'), size=(100, 128))


@pytest.mark.parametrize('name', ['GroundingDINO', 'LiteGroundingDINO'])
def test_a_text_of_more_tokens_than_bert_reads_is_refused(name, detector, images):
    model = detector(name)
    text = ['red'] * 10  # 22 tokens: a dot behind each, and one at both ends
    model.language_model.max_tokens = 22
    make_graph(model, text)
    model.language_model.max_tokens = 21
    with pytest.raises(ValueError, match=r'has 22 tokens, and .* reads 21: .*chunked_size'):
        make_graph(model, text)
    if 'Lite' in name:
        canvas, sizes = batch_of(images[:1])
        with pytest.raises(ValueError, match='the text has 22 tokens'):
            predict(model, canvas, sizes, text)
        model.test_cfg = {**model.test_cfg, 'chunked_size': 5}
        assert np.isfinite(predict(model, canvas, sizes, text)[0].scores).all()


def test_distinct_boxes():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 9, 10]]])
    scores = torch.tensor([[0.5, 0.9, 0.1, -1.0]])
    assert distinct_boxes(boxes, scores, 0.8, 10).tolist() == [[False, True, True, False]]
    assert distinct_boxes(boxes, scores, 0.8, 1).tolist() == [[False, True, False, False]]
    # Of boxes with one score the first is kept; every runtime has to do so.
    alike = torch.tensor([[[0.0, 0, 10, 10]] * 3])
    kept = distinct_boxes(alike, torch.full((1, 3), 0.5), 0.8, 10)
    assert kept.tolist() == [[True, False, False]]
    with pytest.raises(ValueError, match=r'scores \(B, N\)'):
        distinct_boxes(boxes, scores[0], 0.8, 10)
    # Two that overlap by one half: what overlaps by more is dropped. A score of 0 counts.
    halves, scores = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 4]]]), torch.tensor([[0.5, 0.0]])
    for threshold, both in ((0.499, False), (0.5, True), (0.501, True)):
        assert distinct_boxes(halves, scores, threshold, 2).tolist() == [[True, both]]


def test_a_graph_that_fixes_a_free_size_is_refused(detector, monkeypatch):
    find = DetectorGraph.find
    fixed = lambda self, images, *rest: find(self, images[: len(images)], *rest)  # noqa: E731
    monkeypatch.setattr(DetectorGraph, 'find', fixed)
    with pytest.raises(ValueError, match='cannot be exported for images of any size or number'):
        trace(detector('DeformableDETR'), batch=None)


class Rounding(torch.nn.Module):
    """A backbone whose layers round down, up and, without padding, below."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 2, 0), (4, 4, 0), (3, 2, 1), (2, 2, 0)]  # kernel, stride, padding
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, *size) for size in sizes)

    def extract_feat(self, images):
        maps = [images]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return maps[1:]


def test_levels_round_as_the_backbone_does():
    model = Rounding()
    levels = _levels(model)
    assert [stride for stride, _ in levels] == [2, 8, 16, 32]
    for side in range(64, 130):
        maps = model.extract_feat(torch.zeros(1, 3, side, 64))
        assert [feat.shape[2] for feat in maps] == [(side + rest) // s for s, rest in levels]


def test_difference():
    expected = Detections(
        np.array([[0, 0, 10, 10], [5, 5, 9, 9], [1, 1, 2, 2]], np.float32),
        np.array([0.9, 0.5, 0.1], np.float32),
        np.array([0, 1, 0]),
    )
    assert difference(expected, expected, (100, 100)) == (0, 0, 0)
    moved = expected._replace(boxes=expected.boxes + np.float32([[1, 0, 0, 0]]))
    assert difference(expected, moved, (100, 50)).boxes == pytest.approx(1 / 50)
    relabelled = expected._replace(labels=np.array([0, 0, 0]))
    assert difference(expected, relabelled, (100, 100)).boxes == 1
    swapped = Detections(*(array[[1, 0, 2]] for array in expected))
    assert difference(expected, swapped, (100, 100)).boxes == 0


def test_tracing_leaves_the_parts_of_ddq_connected(detector):
    model = detector('DDQDETR')
    shared = model.cache_dict
    with exportable(model):
        for module in model.modules():  # as torch.export does
            module.cache_dict = dict(module.cache_dict)
    assert all(module.cache_dict is shared for module in model.modules())
