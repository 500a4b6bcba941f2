import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
from mmdet_tools import fresh

from mmlite.openmmlab import mmcv_ext

COMPILED = pytest.mark.skipif(
    not getattr(importlib.util.find_spec('mmcv._ext'), 'origin', '').endswith(('.so', '.pyd')),
    reason='this mmcv has no compiled operators to compare with',
)

# Puts the stand-in in the place of whatever mmcv._ext there is.
STAND_IN = """
import sys
from mmlite.openmmlab.startup import _StandIn
sys.meta_path.insert(0, _StandIn)
"""
# Trains a step and predicts with small detectors, from the outside in as mmdet.apis does.
DETECTORS = """
import sys
import mmdet.apis, torch
from small_detectors import batch, losses, small_model

results = {}
for name in ('DINO', 'two-stage', 'DDQ'):
    model = small_model(name)
    model.init_weights()
    data = batch(model)
    found = losses(model, data)
    found['loss'].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        predicted = model.eval()(**data, mode='predict')
    predicted = [(f.pred_instances.bboxes, f.pred_instances.scores) for f in predicted]
    results[name] = dict(found), gradients, predicted
torch.save(results, sys.argv[1])
"""
HELPERS = Path(__file__).parents[1] / 'helpers'


def boxes(n):
    """Boxes (n, 4) and scores (n,), many of which overlap."""
    torch.manual_seed(n)
    boxes = 100 * torch.rand(n, 4)
    boxes[:, 2:] = boxes[:, :2] + 40 * torch.rand(n, 2)
    return boxes, torch.rand(n)


def test_nms_drops_what_overlaps_by_more_than_the_threshold(monkeypatch):
    """Two boxes that overlap by one quarter, and by one half with pixels that belong to them."""
    monkeypatch.setitem(sys.modules, 'torchvision.ops', None)
    boxes, scores = torch.tensor([[0.0, 0, 8, 2], [0, 0, 8, 8]]), torch.tensor([0.5, 1.0])
    assert mmcv_ext.nms(boxes, scores, 0.25, 0).tolist() == [1, 0]
    assert mmcv_ext.nms(boxes, scores, 0.24, 0).tolist() == [1]
    boxes[0, 3], boxes[1, 3] = 1, 3  # 2 and 4 rows of pixels
    assert mmcv_ext.nms(boxes, scores, 0.5, 1).tolist() == [1, 0]
    assert mmcv_ext.nms(boxes, scores, 0.49, 1).tolist() == [1]
    assert mmcv_ext.nms(boxes[:0], scores[:0], 0.5, 0).tolist() == []
    # Each overlaps its neighbours by a third, and what is dropped drops none.
    boxes = torch.tensor([[8.0, 0, 16, 8], [0, 0, 8, 8], [4, 0, 12, 8], [3, 3, 3, 8], [3, 3, 3, 8]])
    assert mmcv_ext.nms(boxes, torch.tensor([1, 3, 2, 0, 0.5]), 0.3, 0).tolist() == [1, 0, 4, 3]


@pytest.mark.parametrize(
    ('package', 'operators'),
    [
        ("raise ImportError('libtorch_cuda.so')", ''),
        # Compiled for another PyTorch, it finds no such operator.
        ("raise RuntimeError('operator torchvision::nms does not exist')", ''),
        ('', "def nms(*args): raise RuntimeError('could not load its C++ operators')"),
        ('', "def nms(*args): raise NotImplementedError('no torchvision::nms on this device')"),
    ],
)
def test_nms_beside_a_torchvision_that_does_not_work(monkeypatch, tmp_path, package, operators):
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'torchvision/__init__.py').write_text(package)
    (tmp_path / 'torchvision/ops.py').write_text(operators)
    known = {name for name in sys.modules if name.partition('.')[0] == 'torchvision'}
    for name in known | {'torchvision', 'torchvision.ops'}:
        monkeypatch.setitem(sys.modules, name, None)  # in the end all is as before
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    kept = mmcv_ext.nms(*boxes(300), iou_threshold=0.5, offset=0)
    assert torch.equal(kept, mmcv_ext._nms(*boxes(300), 0.5))


@pytest.mark.parametrize('weight', [None, 'classes'])
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (1.5, 0.6)])
def test_sigmoid_focal_loss(gamma, alpha, weight):
    torch.manual_seed(0)
    logits = (6 * torch.randn(30, 5)).double().requires_grad_()
    target = torch.randint(6, (30,))  # class 5 is the background
    one_hot = torch.nn.functional.one_hot(target, 6)[:, :5]
    expected = py_sigmoid_focal_loss(logits, one_hot, gamma=gamma, alpha=alpha, reduction='none')
    factors = torch.empty(0).double() if weight is None else torch.rand(6).double()
    if weight is not None:
        expected = expected * factors[target][:, None]
    (gradient,) = torch.autograd.grad(expected.sum(), logits)

    loss, found = torch.zeros(30, 5).double(), torch.zeros(30, 5).double()
    with torch.no_grad():  # as mmcv's autograd function calls it
        arguments = logits, target, factors
        mmcv_ext.sigmoid_focal_loss_forward(*arguments, loss, gamma=gamma, alpha=alpha)
        mmcv_ext.sigmoid_focal_loss_backward(*arguments, found, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, gradient)


def test_sigmoid_focal_loss_of_sure_logits():
    """Where a probability underflows; float16 is computed in float32."""
    logits = torch.tensor([[200.0, -200, 200, -200]]).half()
    none, loss, gradient = torch.empty(0), torch.zeros(1, 4), torch.zeros(1, 4)
    mmcv_ext.sigmoid_focal_loss_forward(logits, torch.tensor([0]), none, loss, 0.5, 0.25)
    mmcv_ext.sigmoid_focal_loss_backward(logits, torch.tensor([0]), none, gradient, 0.5, 0.25)
    torch.testing.assert_close(loss, torch.tensor([[0.0, 0, 150, 0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0, 0.75, 0]]))


def test_ms_deform_attn():
    """Called as mmcv's autograd function calls it."""
    torch.manual_seed(0)
    shapes = torch.tensor([[6, 8], [3, 4]])
    start = torch.tensor([0, 48])
    value = torch.randn(2, 60, 4, 8, requires_grad=True)
    locations = torch.rand(2, 5, 4, 2, 3, 2, requires_grad=True)
    weights = torch.rand(2, 5, 4, 2, 3, requires_grad=True)
    expected = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    grad_output = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (value, locations, weights), grad_output)

    arguments = value, shapes, start, locations, weights
    grads = [torch.zeros_like(g) for g in expected_grads]
    with torch.no_grad():
        output = mmcv_ext.ms_deform_attn_forward(*arguments, im2col_step=64)
        mmcv_ext.ms_deform_attn_backward(*arguments, grad_output, *grads, im2col_step=64)
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(tuple(grads), expected_grads)


def test_other_operators_raise_when_they_are_called():
    operator = mmcv_ext.roi_align_forward
    with pytest.raises(
        NotImplementedError, match=r"roi_align_forward is one of .* mim install 'mm"
    ):
        operator(torch.zeros(1), aligned=True)
    with pytest.raises(AttributeError):
        _ = mmcv_ext.__no_such_thing__


def test_is_no_backend_of_our_own_operators():
    """It calls them: one that calls it back would never return."""
    output = fresh(
        f'{STAND_IN}import mmcv.ops, mmcv._ext\n'
        'from mmlite.ops import mmcv as backend\n'
        'print(mmcv._ext.__file__, backend._problem(), sep="\\n")\n'
    )
    assert output[-2:] == [mmcv_ext.__file__, 'this mmcv is built without CUDA']


@COMPILED
def test_stock_detectors_give_the_same_numbers(tmp_path):
    fresh(DETECTORS, tmp_path / 'compiled.pth', path=HELPERS)
    fresh(STAND_IN + DETECTORS, tmp_path / 'stand_in.pth', path=HELPERS)
    expected, found = (
        torch.load(tmp_path / f'{name}.pth', weights_only=True) for name in ('compiled', 'stand_in')
    )
    assert len(expected) == 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
