from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

from mmlite.openmmlab import mmcv_ext

# What an installed package has beside itself and not in it.
PTH = Path(__file__).parents[2] / 'mmlite/openmmlab/startup.pth'
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

results = {{}}
for name in {names}:
    model = small_model(name, {encoder})
    model.init_weights()
    data = batch(model)
    found = losses(model, data)
    found['loss'].backward()
    gradients = {{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    with torch.no_grad():
        predicted = model.eval()(**data, mode='predict')
    predicted = [(f.pred_instances.bboxes, f.pred_instances.scores) for f in predicted]
    results[name] = dict(found), gradients, predicted
torch.save(results, sys.argv[1])
"""
HELPERS = Path(__file__).parents[1] / 'helpers'


def run(code: str, *arguments: str, path: str | os.PathLike = '') -> str:
    path = os.pathsep.join([str(path), os.environ.get('PYTHONPATH', '')])
    process = subprocess.run(
        [sys.executable, '-c', code, *arguments],
        cwd=Path(__file__).parent,  # where no other mmlite than the installed one is found
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, 'PYTHONPATH': path},
    )
    assert process.returncode == 0, process.stdout[-3000:]
    return process.stdout


@pytest.fixture
def boxes():
    """Makes boxes (n, 4) and scores (n,), many of which overlap."""

    def make(n):
        torch.manual_seed(n)
        boxes = 100 * torch.rand(n, 4)
        boxes[:, 2:] = boxes[:, :2] + 40 * torch.rand(n, 2)
        return boxes, torch.rand(n)

    return make


@COMPILED
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('n', [0, 1, 7, 1500])
def test_nms(boxes, monkeypatch, n, offset):
    from mmcv import _ext

    expected = _ext.nms(*boxes(n), iou_threshold=0.5, offset=offset)
    assert torch.equal(mmcv_ext.nms(*boxes(n), iou_threshold=0.5, offset=offset), expected)
    monkeypatch.setitem(sys.modules, 'torchvision.ops', None)  # where it is installed
    assert torch.equal(mmcv_ext.nms(*boxes(n), iou_threshold=0.5, offset=offset), expected)


def test_nms_across_blocks(boxes, monkeypatch):
    expected = mmcv_ext._nms(*boxes(300), 0.5)
    assert 10 < len(expected) < 290
    for block in (1, 7, 64, 300, 1000):
        monkeypatch.setattr(mmcv_ext, '_BLOCK', block)
        assert torch.equal(mmcv_ext._nms(*boxes(300), 0.5), expected)


@pytest.mark.parametrize('block', [1, 2])  # compared with what is kept, and inside of a block
def test_nms_drops_what_overlaps_by_more_than_the_threshold(monkeypatch, block):
    """Two boxes that overlap by one quarter, and by one half with pixels that belong to them."""
    monkeypatch.setattr(mmcv_ext, '_BLOCK', block)
    monkeypatch.setitem(sys.modules, 'torchvision.ops', None)
    boxes, scores = torch.tensor([[0.0, 0, 8, 2], [0, 0, 8, 8]]), torch.tensor([0.5, 1.0])
    assert mmcv_ext.nms(boxes, scores, 0.25, 0).tolist() == [1, 0]
    assert mmcv_ext.nms(boxes, scores, 0.24, 0).tolist() == [1]
    boxes[0, 3], boxes[1, 3] = 1, 3  # 2 and 4 rows of pixels
    assert mmcv_ext.nms(boxes, scores, 0.5, 1).tolist() == [1, 0]
    assert mmcv_ext.nms(boxes, scores, 0.49, 1).tolist() == [1]


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
def test_nms_beside_a_torchvision_that_does_not_work(
    boxes, monkeypatch, tmp_path, package, operators
):
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


@COMPILED
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', [0, 1, 2])
@pytest.mark.parametrize('n', [0, 1, 200])
def test_softnms(boxes, n, method, offset):
    from mmcv import _ext

    options = dict(iou_threshold=0.3, sigma=0.5, min_score=0.02, method=method, offset=offset)
    found, expected = torch.zeros(n, 5), torch.zeros(n, 5)
    kept = _ext.softnms(*boxes(n), expected, **options)
    assert torch.equal(mmcv_ext.softnms(*boxes(n), found, **options), kept)
    torch.testing.assert_close(found[: len(kept)], expected[: len(kept)])


@pytest.mark.parametrize(
    'method, iou_threshold, min_score, expected',
    [
        (0, 0.25, 0.0, [1.0, 0.0]),  # from the threshold on
        (0, 0.26, 0.0, [1.0, 0.5]),
        (1, 0.25, 0.375, [1.0, 0.375]),  # times 1 - 0.25; the lowest score itself is kept
        (1, 0.26, 0.375, [1.0, 0.5]),
        (1, 0.25, 0.38, [1.0]),
        (2, 0.9, 0.0, [1.0, 0.5 * math.exp(-0.125)]),  # exp(-0.25 ** 2 / 0.5), at every overlap
    ],
)
def test_softnms_at_its_boundaries(method, iou_threshold, min_score, expected):
    """Two boxes that overlap by one quarter."""
    boxes = torch.tensor([[0.0, 0, 8, 2], [0, 0, 8, 8]])
    dets = torch.zeros(2, 5)
    kept = mmcv_ext.softnms(
        boxes, torch.tensor([0.5, 1.0]), dets, iou_threshold, 0.5, min_score, method, 0
    )
    assert kept.tolist() == [1, 0][: len(expected)]
    torch.testing.assert_close(dets[: len(kept), 4], torch.tensor(expected))
    assert torch.equal(dets[: len(kept), :4], boxes[kept])


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
    mmcv_ext.sigmoid_focal_loss_forward(logits, target, factors, loss, gamma=gamma, alpha=alpha)
    mmcv_ext.sigmoid_focal_loss_backward(logits, target, factors, found, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, gradient)


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

    with torch.no_grad():
        output = mmcv_ext.ms_deform_attn_forward(
            value, shapes, start, locations, weights, im2col_step=64
        )
        grads = [torch.zeros_like(g) for g in expected_grads]
        mmcv_ext.ms_deform_attn_backward(
            value, shapes, start, locations, weights, grad_output, *grads, im2col_step=64
        )
    torch.testing.assert_close(output, expected.detach())
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad)


def test_other_operators_raise_when_they_are_called():
    operator = mmcv_ext.roi_align_forward
    with pytest.raises(NotImplementedError) as raised:
        operator(torch.zeros(1), aligned=True)
    assert 'roi_align_forward is one of mmcv' in str(raised.value)
    assert "mim install 'mmcv>=2.0.0,<2.2'" in str(raised.value)
    assert '\n' not in str(raised.value)
    with pytest.raises(AttributeError):
        _ = mmcv_ext.__no_such_thing__


def test_is_no_backend_of_our_own_operators():
    """It calls them: one that calls it back would never return."""
    output = run(
        f'{STAND_IN}import mmcv.ops, mmcv._ext\n'
        'from mmlite.ops import mmcv as backend\n'
        'print(mmcv._ext.__file__, backend.status(), sep="\\n")\n'
    )
    assert output.splitlines()[-2:] == [
        mmcv_ext.__file__,
        "(False, 'this mmcv is built without CUDA')",
    ]


@pytest.fixture
def site(tmp_path):
    """A folder with what Python runs at its start, and an mmcv without compiled operators."""
    (tmp_path / 'mmlite_startup.pth').write_text(PTH.read_text())
    (tmp_path / '_mmlite_imports.py').write_text(PTH.with_name('startup.py').read_text())
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text('')
    return tmp_path


# What Python does with its own site-packages when it starts, after those of this environment.
ADD_SITE = 'import site, sys\nsite.addsitedir(sys.argv[1])\nbefore = set(sys.modules)\n'


def test_pth_file_answers_for_the_missing_module(site):
    output = run(
        f'{ADD_SITE}'
        "print({'torch', 'mmlite', 'mmcv'} & before)\n"
        'import mmcv._ext\n'
        'print(mmcv._ext.__file__, callable(mmcv._ext.anything))\n'
        'try:\n'
        '    import mmcv._other\n'
        'except ModuleNotFoundError as error:\n'
        '    print(error)\n',
        str(site),
        path=site,
    )
    assert output.splitlines() == [
        'set()',
        f'{mmcv_ext.__file__} True',
        "No module named 'mmcv._other'",
    ]


@pytest.mark.parametrize('code', ['real = True', "raise ImportError('built for another torch')"])
def test_pth_file_leaves_a_module_that_is_there_alone(site, code):
    (site / 'mmcv/_ext.py').write_text(code + '\n')
    output = run(
        f'{ADD_SITE}'
        'try:\n'
        '    import mmcv._ext\n'
        '    print(mmcv._ext.real)\n'
        'except ImportError as error:\n'
        '    print(error)\n'
        "print('mmlite' in sys.modules)\n",
        str(site),
        path=site,
    )
    assert output.split('\n')[0] in ('True', 'built for another torch')
    assert output.split()[-1] == 'False'


@COMPILED
def test_stock_detectors_give_the_same_numbers(tmp_path):
    code = DETECTORS.format(names=['DINO', 'two-stage', 'DDQ'], encoder=None)
    run(code, str(tmp_path / 'compiled.pth'), path=HELPERS)
    run(STAND_IN + code, str(tmp_path / 'stand_in.pth'), path=HELPERS)
    expected, found = (
        torch.load(tmp_path / f'{name}.pth', weights_only=True) for name in ('compiled', 'stand_in')
    )
    assert len(expected) == 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_lite_detector_trains_and_predicts_on_the_stand_in(tmp_path):
    code = DETECTORS.format(names=['DINO'], encoder=dict(schedule='H3L1-(2+1)x1'))
    run(STAND_IN + code, str(tmp_path / 'lite.pth'), path=HELPERS)
    ((losses, gradients, predicted),) = torch.load(tmp_path / 'lite.pth').values()
    assert losses and len(gradients) > 50 and len(predicted) == 2
