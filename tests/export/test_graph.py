"""The whole detector as one function: MMDetection's numbers, with padding and without."""

from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported import DETECTORS, TEXT, batch_of
from mmdet.models.detectors import DINO
from mmengine.config import Config

from mmlite.export.compare import difference, predict
from mmlite.export.detector import Detections, detections_of
from mmlite.export.graph import DetectorGraph
from mmlite.export.operators import distinct_boxes
from mmlite.export.program import _levels, exportable, make_graph, trace
from mmlite.export.pytorch import pytorch_detector


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
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    canvas, sizes = batch_of(images[: 1 + padded], divisor)
    if not padded:
        sizes = [canvas.shape[-2:]]
    with exportable(model), torch.inference_mode():
        graph = make_graph(model, text)
        outputs = graph(torch.from_numpy(canvas), torch.tensor(sizes) if padded else None)
    outputs = [output.numpy() for output in outputs]
    assert len(outputs) == len(graph.outputs)
    for number, found in enumerate(predict(model, canvas, sizes, text)):
        # The detector says different things.
        if has_masks := 'Mask2Former' in name:
            assert (found.masks.any(0) != found.masks.all(0)).any()
        else:
            assert np.ptp(found.boxes, 0).max() > 0
        actual = detections_of(outputs, number, sizes[number])
        # Mask2Former's layers see what a mask holds: a pixel more or less where its logit is zero.
        assert max(difference(found, actual, canvas.shape[-2:])) < (1e-4 if has_masks else 1e-5)


@pytest.mark.parametrize('name', ['LiteDINO', 'DDQDETR'])
def test_the_model_is_as_it_was(name, detector):
    """The parts of DDQ-DETR speak through a dict that all of them hold."""
    model = detector(name).train()
    before = [type(module) for module in model.modules()]
    shared = getattr(model, 'cache_dict', None)
    with exportable(model):
        assert not model.training
        norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert not norms, 'folded into the convolutions'
        for module in model.modules():  # as torch.export does
            if hasattr(module, 'cache_dict'):
                module.cache_dict = dict(module.cache_dict)
    assert model.training and getattr(model.encoder, 'low_levels', None) is None
    assert [type(module) for module in model.modules()] == before
    assert all(getattr(module, 'cache_dict', None) is shared for module in model.modules())


# A detector, a part of it, what is changed there, and why it cannot be exported.
OTHER = type('Other', (DINO,), {'predict': None})
REFUSED = [
    ('DINO', 'bbox_head.loss_cls', dict(use_sigmoid=False), 'scores with a softmax'),
    ('DINO', '', dict(encoder=torch.nn.Identity()), 'DINO has no multi-scale encoder; exported'),
    ('DINO', 'encoder', dict(__class__=torch.nn.Module), 'its encoder is Module; that works for'),
    ('DINO', '', dict(__class__=OTHER), 'Other cannot be exported: it has a'),
    ('DDQDETR', '', dict(dqs_cfg=dict(type='soft_nms')), 'dqs_cfg must be dict'),
    ('DDQDETR', 'decoder', dict(num_layers=1), 'needs two layers to choose distinct queries'),
    ('GroundingDINO', '', dict(test_cfg=dict(chunked_size=40)), 'reads its text in parts'),
    ('GroundingDINO', 'language_model', dict(pad_to_max=True), 'needs pad_to_max=False'),
    ('GroundingDINO', '', {}, 'needs a text'),
    (
        'Mask2Former',
        '',
        dict(panoptic_fusion_head=torch.nn.Identity()),
        'its Identity is no MaskFormerFusionHead',
    ),
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
    model, wrapper = detector('DINO'), torch.nn.Module()
    wrapper.teacher = model
    for arguments, sentence in (
        ((torch.nn.Linear(1, 1),), 'Linear has no multi-scale encoder; exported can be Def'),
        ((wrapper,), 'take the detector inside'),
        ((model, TEXT), 'DINO takes no text'),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_graph(*arguments)
    with pytest.raises(ValueError, match='pads images to multiples of 32'):
        trace(detector('Mask2Former'), size=(100, 128))


@pytest.mark.parametrize('name', ['GroundingDINO', 'LiteGroundingDINO'])
def test_a_text_of_more_tokens_than_bert_reads_is_refused(name, detector, images):
    model, text = detector(name), ['red'] * 10  # 22 tokens: a dot behind each, and both ends
    model.language_model.max_tokens = 22
    make_graph(model, text)
    model.language_model.max_tokens = 21
    with pytest.raises(ValueError, match=r'has 22 tokens, and .* reads 21: .*chunked_size'):
        make_graph(model, text)
    with pytest.raises(ValueError, match='needs a text'):
        make_graph(model, ['red', ' '])
    config = Config(dict(test_dataloader=dict(dataset=dict(metainfo=dict(classes=text)))))
    with pytest.raises(ValueError, match='the text has 22 tokens'):
        pytorch_detector(model, config)
    model.test_cfg = {**model.test_cfg, 'chunked_size': 5}
    assert pytorch_detector(model, config).classes == text
    del model.test_cfg['chunked_size']
    if 'Lite' in name:
        batch = batch_of(images[:1])
        with pytest.raises(ValueError, match='the text has 22 tokens'):
            predict(model, *batch, text)
        model.test_cfg = {**model.test_cfg, 'chunked_size': 5}
        assert np.isfinite(predict(model, *batch, text)[0].scores).all()


def test_distinct_boxes():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 9, 10]]])
    halves = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 4]]])
    for arguments, kept in (
        ((boxes, [0.5, 0.9, 0.1, -1.0], 0.8, 10), [False, True, True, False]),
        ((boxes, [0.5, 0.9, 0.1, -1.0], 0.8, 1), [False, True, False, False]),
        # Of boxes with one score the first is kept; every runtime has to do so.
        ((boxes[:, :1].repeat(1, 3, 1), [0.5] * 3, 0.8, 10), [True, False, False]),
        # Two that overlap by one half: what overlaps by more is dropped. A score of 0 counts.
        ((halves, [0.5, 0.0], 0.499, 2), [True, False]),
        ((halves, [0.5, 0.0], 0.5, 2), [True, True]),
    ):
        found, scores, *rest = arguments
        assert distinct_boxes(found, torch.tensor([scores]), *rest).tolist() == [kept]
    with pytest.raises(ValueError, match=r'scores \(B, N\)'):
        distinct_boxes(boxes, torch.zeros(4), 0.8, 10)


def test_a_graph_that_fixes_a_free_size_is_refused(detector, monkeypatch):
    find = DetectorGraph.find
    fixed = lambda self, images, *rest: find(self, images[: len(images)], *rest)  # noqa: E731
    monkeypatch.setattr(DetectorGraph, 'find', fixed)
    with pytest.raises(ValueError, match='cannot be exported for images of any size or number'):
        trace(detector('DeformableDETR'), batch=None)


@pytest.mark.parametrize('divisor', [1, 4])
def test_levels_round_as_the_backbone_does(divisor):
    """Layers that round down, up and, without padding, below; of sides that images can have."""
    sizes = [(3, 2, 0), (4, 4, 0), (3, 2, 1), (2, 2, 0)]  # kernel, stride, padding
    layers = [torch.nn.Conv2d(3, 3, *size) for size in sizes]

    def extract_feat(images: torch.Tensor) -> list[torch.Tensor]:
        assert images.shape[2] % divisor == 0  # a Swin of timm asks for that
        return list(accumulate(layers, lambda x, f: f(x), initial=images))[1:]

    levels = _levels(SimpleNamespace(extract_feat=extract_feat), divisor)
    assert [stride for stride, _ in levels] == [2, 8, 16, 32]
    for side in range(64, 130, divisor):
        maps = extract_feat(torch.zeros(1, 3, side, 64))
        assert [feat.shape[2] for feat in maps] == [(side + rest) // s for s, rest in levels]


def test_difference():
    boxes = np.array([[0, 0, 10, 10], [5, 5, 9, 9], [1, 1, 2, 2]], np.float32)
    expected = Detections(boxes, np.float32([0.9, 0.5, 0.1]), np.array([0, 1, 0]))
    moved = boxes + np.float32([[0], [9], [9]])
    for changes, wanted in (
        ({}, (0, 0, 0)),
        # Scores that differ by so much may exchange the last two.
        ({'scores': np.float32([0.9, 0.5, 0.35]), 'boxes': moved}, (0, 0.25, 0)),
        ({'boxes': boxes + np.float32([[1, 0, 0, 0]])}, (1 / 50, 0, 0)),
        ({'labels': np.array([0, 0, 0])}, (1, 0, 0)),
        ({'scores': expected.scores - np.float32(0.01)}, (0, 0.01, 0)),
        ({name: getattr(expected, name)[[1, 0, 2]] for name in expected._fields}, (0, 0.4, 0)),
    ):
        found = difference(expected, expected._replace(**changes), (100, 50))
        assert found == pytest.approx(wanted, abs=1e-6)
    fewer = Detections(*(array[:2] for array in expected))
    assert difference(expected, fewer, (100, 50)) == (1, 1, 1)
