"""mmcv's CUDA operator as a backend, with an operator on the CPU in its place."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from operator_cases import PYRAMID, Case

from mmlite.ops import mmcv as backend
from mmlite.ops import reference

MODULE = 'mmcv.ops.multi_scale_deform_attn'


class Function:
    """Stands for mmcv's, and notes what it gets."""

    calls: ClassVar[list] = []

    @classmethod
    def apply(cls, value, shapes, starts, locations, weights, im2col_step):
        tensors = (value, locations, weights)
        cls.calls.append((tensors, starts.tolist(), im2col_step))
        assert len({tensor.dtype for tensor in tensors}) == 1
        assert all(tensor.is_contiguous() for tensor in tensors)
        return reference.ms_deform_attn(value, shapes.tolist(), locations, weights)


@pytest.fixture
def mmcv(monkeypatch):
    Function.calls = []
    extension = SimpleNamespace(get_compiling_cuda_version=lambda: '11.8')
    module = SimpleNamespace(ext_module=extension, MultiScaleDeformableAttnFunction=Function)
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def on_gpu(dtype=torch.float32):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device='cuda:0')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_computes_the_same(mmcv, dtype):
    case = Case('standard', dtype=dtype)
    case.inputs['value'] = case.inputs['value'].transpose(0, 1).contiguous().transpose(0, 1)
    expected = case.run('reference')
    case.call = lambda inputs: backend.ms_deform_attn(
        inputs['value'], case.spatial_shapes, None, inputs['locations'], inputs['weights']
    )
    actual = case.run('reference')
    assert actual['output'].dtype == dtype
    case.compare(actual, expected, 1e-6, 1e-6)
    ((tensors, starts, im2col_step),) = Function.calls
    assert tensors[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert starts == [0, 63, 83, 89] and im2col_step == 2


@pytest.mark.parametrize('queries', [11, 0])
def test_offsets(mmcv, queries):
    query, key, *arguments = Case('standard', queries=queries).from_offsets(boxes=True).arguments
    arguments[1] = list(PYRAMID)
    actual = backend.ms_deform_attn(*arguments)
    assert bool(Function.calls) == bool(queries)  # nothing is launched for nothing
    torch.testing.assert_close(actual, reference.deform_attn(query, key, *arguments))


def test_says_why_not(mmcv, monkeypatch):
    assert backend.why_not(on_gpu()) == backend.why_not(on_gpu(torch.bfloat16)) == ''
    assert backend.why_not(torch.zeros(1)) == 'it runs on CUDA, and value is on cpu'
    assert 'torch.int8' in backend.why_not(on_gpu(torch.int8))
    monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
    assert 'not deterministic' in backend.why_not(on_gpu())
    with torch.no_grad():
        assert backend.why_not(on_gpu()) == ''


def test_an_mmcv_without_cuda_or_none(mmcv, monkeypatch):
    for extension in ({}, {'get_compiling_cuda_version': lambda: 'not available'}):
        mmcv.ext_module = SimpleNamespace(**extension)
        assert backend.why_not(on_gpu()) == 'this mmcv is built without CUDA'
    monkeypatch.delitem(sys.modules, MODULE)
    assert backend.why_not(on_gpu()) == 'mmcv.ops is not imported'
    assert MODULE not in sys.modules
