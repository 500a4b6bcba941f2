from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mmlite import ops
from mmlite.analysis import operators
from mmlite.analysis.operators import (
    KEY_AWARE,
    STANDARD,
    Shape,
    _forward_backward,
    benchmark_operators,
    benchmark_scaling,
    contestants,
)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_contestants_compute_the_same(dtype):
    inputs = Shape((64, 96), num_heads=4, head_dim=8, dtype=dtype).inputs()
    calls, _ = contestants(inputs, 'cpu')
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for (operator, _), call in calls.items():
        expected = calls[operator, 'reference'](inputs)
        torch.testing.assert_close(call(inputs), expected, atol=tolerance, rtol=tolerance)
    assert (STANDARD, 'mmcv') in calls
    assert (KEY_AWARE, 'reference') in calls


def test_reports_every_backend_once():
    steps = []
    results, left_out = benchmark_operators(
        Shape((32, 32), num_queries=5, num_heads=2, head_dim=8),
        rounds=2,
        start=lambda text, total: lambda: steps.append(total),
    )
    names = [(r.operator, r.backend, r.direction) for r in results]
    assert len(set(names)) == len(names)
    assert steps.count(steps[0]) == 2 * steps[0]  # the bar of each direction runs to its end
    for result in results:
        if result.backend == 'reference':
            assert result.over_reference.median == 1
        assert (result.bandwidth is None) == (result.direction != 'forward')
    reasons = {name.partition(' ')[0] for name in left_out}
    assert reasons <= {STANDARD, KEY_AWARE}


def test_scaling_by_threads_restores_them():
    before = torch.get_num_threads()
    curve = benchmark_scaling(Shape((32, 32), num_heads=2, head_dim=8), 'threads', [1, 2], rounds=2)
    assert [point['value'] for point in curve] == [1, 2]
    assert torch.get_num_threads() == before


WITHOUT_MMDETECTION = """
import sys
from importlib import metadata

real = metadata.version

def version(name):
    if name.startswith(('mm', 'onedl')) and name != 'mmlite-detr':
        raise metadata.PackageNotFoundError(name)
    return real(name)

metadata.version = version
for name in ('mmcv', 'mmengine', 'mmdet'):
    sys.modules[name] = None
from mmlite.analysis.operators import Shape, benchmark_operators
results, left_out = benchmark_operators(Shape((32, 32)), rounds=2, passes=('forward',))
assert 'ms_deform_attn (mmcv)' in left_out
assert all(result.over_mmcv is None for result in results)
"""


def test_works_with_torch_alone():
    """The operators can be measured where MMDetection is not installed."""
    subprocess.run([sys.executable, '-c', WITHOUT_MMDETECTION], check=True, timeout=120)


def shape(**own) -> Shape:
    return Shape((64, 96), num_heads=4, head_dim=8, **own)


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


def test_what_is_not_there_is_left_out_with_the_reason(monkeypatch):
    def broken(device):
        raise OSError(f'no kernel for {device}\nand much more')

    monkeypatch.setitem(operators.OTHERS, 'deformops', broken)
    _, left_out = contestants(shape().inputs(), 'cpu')
    assert left_out[f'{STANDARD} (deformops)'] == 'no kernel for cpu'
    assert left_out[f'{STANDARD} (Hugging Face)'] == 'it runs on CUDA'


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
    operator = operators.hugging_face('cuda')
    calls, _ = contestants(inputs, 'cpu')
    grads = [
        _forward_backward(call, [inputs])(0) for call in (operator, calls[STANDARD, 'reference'])
    ]
    for actual, wanted in zip(*grads):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert installed == [(operators._HUB_KERNEL, True)]  # nothing is fetched
