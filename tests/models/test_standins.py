import importlib
import sys

import other_repositories as others
import pytest
import torch

from mmlite.models import standins

SHAPES = torch.tensor([(3, 5), (2, 2)])
NAMES = ('MultiScaleDeformableAttention', 'groundingdino', 'groundingdino._C')


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The stand-ins, for one test; Grounding DINO is there without its compiled module."""
    monkeypatch.setattr(sys, 'meta_path', [*sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'groundingdino').mkdir()
    (tmp_path / 'groundingdino/__init__.py').touch()
    importlib.invalidate_caches()
    with pytest.raises(ImportError):
        importlib.import_module(NAMES[0])
    importlib.import_module('mmlite.standins')
    standins.install()
    assert sys.meta_path.count(standins._Finder) == 1
    yield tmp_path
    for name in (*NAMES, 'mmlite.standins'):
        sys.modules.pop(name, None)


def call(module, dtype, starts):
    """Output and gradients by the module's functions, and by the formulas in float64."""
    torch.manual_seed(0)
    value, locations = torch.randn(3, 19, 2, 4, dtype=dtype), torch.rand(3, 5, 2, 2, 3, 2)
    weights, grad = torch.rand(3, 5, 2, 2, 3), torch.randn(3, 5, 8, dtype=dtype)
    points = [locations.to(dtype), weights.to(dtype)]
    given = [SHAPES, *starts, *points]
    output = module.ms_deform_attn_forward(value, *given, 2)
    found = [output, *module.ms_deform_attn_backward(value, *given, grad, 2)]
    assert {each.dtype for each in found} == {dtype}
    inputs = [each.double().requires_grad_() for each in (value, *points)]
    expected = others.ms_deform_attn_core_pytorch(inputs[0], SHAPES, *inputs[1:])
    grads = torch.autograd.grad(expected, inputs, grad.double())
    return [each.double() for each in found], [expected, *grads]


@pytest.mark.parametrize('name', ['MultiScaleDeformableAttention', 'groundingdino._C'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_forward_and_backward(name, dtype, installed):
    module = importlib.import_module(name)
    tolerance = 1e-2 if dtype == torch.float16 else 1e-4
    for starts in ([torch.tensor([0, 15])], []):  # TrackFormer has no starts
        with torch.autocast('cpu', torch.bfloat16):
            found, expected = call(module, dtype, starts)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_as_repositories_import_it(installed):
    from groundingdino import _C

    assert _C.ms_deform_attn_forward is standins.ms_deform_attn_forward
    with pytest.raises(ImportError):
        importlib.import_module('groundingdino._D')


def test_the_real_module_comes_first(installed):
    (installed / 'MultiScaleDeformableAttention.py').write_text('REAL = True\n')
    importlib.invalidate_caches()
    assert importlib.import_module('MultiScaleDeformableAttention').REAL
