from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mmlite.analysis.operators import (
    KEY_AWARE,
    STANDARD,
    Shape,
    _calls,
    benchmark_operators,
    benchmark_scaling,
)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_contestants_compute_the_same(dtype):
    inputs = Shape((64, 96), num_heads=4, head_dim=8, dtype=dtype).inputs()
    calls, _ = _calls(inputs, 'cpu')
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
        start=lambda total: lambda: steps.append(total),
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
