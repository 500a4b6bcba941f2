"""The whole detector as one function: MMDetection's numbers, with padding and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import TEXT, batch_of

from mmlite.export.compare import difference, predict
from mmlite.export.detector import Detections, detections_of
from mmlite.export.graph import DetectorGraph
from mmlite.export.nms import distinct_boxes
from mmlite.export.program import exportable, make_graph, trace

NAMES = [
    'DINO',
    'DeformableDETR',
    'DeformableDETR refining',
    'DeformableDETR two-stage',
    'HDeformableDETR',
    'LiteDINO',
    'LiteDINO with a key of its own',
    'LiteDINO with the same locations',
    'LiteDINO with a key-aware decoder',
    'LiteDeformableDETR',
    'DDQDETR',
    'LiteDDQDETR with a key-aware decoder',
    'GroundingDINO',
    'LiteGroundingDINO',
    'Mask2Former',
    'LiteMask2Former',
    'LiteMask2Former panoptic',
]


@pytest.fixture(autouse=True)
def one_thread():
    """Where masks are cut at one half, sums in another order switch pixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('name', NAMES)
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


def test_refuses_what_it_would_compute_wrongly(detector):
    with pytest.raises(ValueError, match='Linear cannot be exported: that works for Deformable'):
        DetectorGraph(torch.nn.Linear(1, 1))

    model = detector('DINO')

    class Other(type(model)):
        def pre_decoder(self, *args, **kwargs):
            return super().pre_decoder(*args, **kwargs)

    model.__class__ = Other
    with pytest.raises(ValueError, match='Other has a pre_decoder of its own'):
        DetectorGraph(model)
    model = detector('DINO')
    model.bbox_head.loss_cls.use_sigmoid = False
    with pytest.raises(ValueError, match='softmax'):
        DetectorGraph(model)


def test_refuses_what_a_family_cannot_export(detector):
    with pytest.raises(ValueError, match='Linear has no multi-scale encoder; exported can be Def'):
        make_graph(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match='take the detector inside'):
        make_graph(Wrapper(detector('DINO')))
    with pytest.raises(ValueError, match='DINO takes no text'):
        make_graph(detector('DINO'), TEXT)
    model = detector('DDQDETR')
    model.dqs_cfg = dict(type='soft_nms', iou_threshold=0.8)
    with pytest.raises(ValueError, match=r"dict\(type='nms', iou_threshold=...\)"):
        make_graph(model)
    model = detector('GroundingDINO')
    with pytest.raises(ValueError, match='needs a text'):
        make_graph(model)
    model.test_cfg = dict(chunked_size=40)
    with pytest.raises(ValueError, match='reads its text in parts'):
        make_graph(model, TEXT)
    model = detector('Mask2Former')
    with pytest.raises(ValueError, match='pads images to multiples of 32'):
        trace(model, size=(100, 128))
    model.panoptic_fusion_head = torch.nn.Identity()
    with pytest.raises(ValueError, match='its panoptic_fusion_head is Identity'):
        make_graph(model)


class Wrapper(torch.nn.Module):
    """A semi-supervised wrapper, as far as its parts go."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.teacher = model


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


@pytest.mark.parametrize('threshold, both', [(0.5, True), (0.499, False), (0.501, True)])
def test_distinct_boxes_at_the_threshold(threshold, both):
    """They overlap by one half; what overlaps by more is dropped. A score of 0 counts."""
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 4]]])
    kept = distinct_boxes(boxes, torch.tensor([[0.5, 0.0]]), threshold, 2)
    assert kept.tolist() == [[True, both]]


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
