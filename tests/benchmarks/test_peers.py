"""The calls that operators of other packages get."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import torch

from benchmarks import peers
from mmlite import ops
from mmlite.analysis.inputs import OperatorShape
from mmlite.analysis.operators import OTHERS, STANDARD, OperatorOnBackend, contestants


def inputs(batch_size: int = 1):
    return OperatorShape((64, 96), batch_size, num_heads=4, head_dim=8).inputs()


def compare(run, x) -> None:
    """Outputs and gradients are those of our reference."""
    found, _ = contestants([x], 'cpu')
    reference = next(e.run for e in found if (e.operator, e.backend) == (STANDARD, 'reference'))
    torch.testing.assert_close(run(x), reference(x))
    grads = [
        OperatorOnBackend(STANDARD, '', each, [x]).call('forward+backward')(0)
        for each in (run, reference)
    ]
    for actual, wanted in zip(*grads):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def ours(value, shapes, starts, locations, weights):
    tokens = shapes.prod(-1)
    assert torch.equal(starts, tokens.cumsum(0) - tokens)
    assert value.dtype == locations.dtype == weights.dtype
    return ops.ms_deform_attn(value, shapes, locations, weights)


def test_deformops_is_measured_where_it_is_installed(monkeypatch):
    package = ModuleType('deformops')
    package.registry = SimpleNamespace(msda=ours)
    monkeypatch.setitem(sys.modules, 'deformops', package)
    monkeypatch.setitem(sys.modules, 'deformops.registry', package.registry)
    monkeypatch.setitem(OTHERS, 'deformops', peers.deformops)
    x = inputs()
    found, left_out = contestants([x], 'cpu')
    assert not any('deformops' in name for name in left_out)
    compare(next(each.run for each in found if each.backend == 'deformops'), x)


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
    compare(peers.hugging_face('cuda'), inputs(batch_size=2))
    assert installed == [(peers.HUB_KERNEL, True)]  # nothing is fetched
