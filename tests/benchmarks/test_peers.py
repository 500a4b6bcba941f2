"""The calls that operators of other packages get."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import peers
from mmlite import ops
from mmlite.analysis.inputs import OperatorShape
from mmlite.analysis.operators import OTHERS, STANDARD, _forward_backward, contestants


def shape(**own) -> OperatorShape:
    return OperatorShape((64, 96), num_heads=4, head_dim=8, **own)


def ours(value, shapes, starts, locations, weights):
    tokens = shapes.prod(-1)
    assert torch.equal(starts, tokens.cumsum(0) - tokens)
    assert value.dtype == locations.dtype == weights.dtype
    return ops.ms_deform_attn(value, shapes, locations, weights)


@pytest.fixture
def deformops(monkeypatch):
    registry = SimpleNamespace(msda=ours)
    package = ModuleType('deformops')
    package.registry = registry
    monkeypatch.setitem(sys.modules, 'deformops', package)
    monkeypatch.setitem(sys.modules, 'deformops.registry', registry)
    monkeypatch.setitem(OTHERS, 'deformops', peers.deformops)


def test_deformops_is_measured_where_it_is_installed(deformops):
    inputs = shape().inputs()
    calls, left_out = contestants(inputs, 'cpu')
    assert not any('deformops' in name for name in left_out)
    expected = calls[STANDARD, 'reference']
    torch.testing.assert_close(calls[STANDARD, 'deformops'](inputs), expected(inputs))
    grads = [_forward_backward(calls[STANDARD, n], [inputs])(0) for n in ('deformops', 'reference')]
    for actual, wanted in zip(*grads):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_hugging_faces_kernel(monkeypatch):
    """The calls it gets, on a kernel that is made up."""

    class Kernel:
        @staticmethod
        def ms_deform_attn_forward(value, shapes, starts, locations, weights, images):
            assert images == 2
            return ours(value, shapes, starts, locations, weights)

        @staticmethod
        def ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, images):
            assert images == 2
            leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
            with torch.enable_grad():
                output = ops.ms_deform_attn(leaves[0], shapes, *leaves[1:])
            return torch.autograd.grad(output, leaves, grad)

    installed = []

    def install_kernel(name, **options):
        installed.append((name, options['local_files_only']))
        return 'path'

    kernels = SimpleNamespace(
        install_kernel=install_kernel,
        get_local_kernel=lambda path: Kernel if path == 'path' else None,
    )
    monkeypatch.setitem(sys.modules, 'kernels', kernels)
    inputs = shape(batch_size=2).inputs()
    operator = peers.hugging_face('cuda')
    calls, _ = contestants(inputs, 'cpu')
    grads = [
        _forward_backward(call, [inputs])(0) for call in (operator, calls[STANDARD, 'reference'])
    ]
    for actual, wanted in zip(*grads):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert installed == [(peers.HUB_KERNEL, True)]  # nothing is fetched
