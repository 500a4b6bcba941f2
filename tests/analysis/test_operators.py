from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mmlite.analysis.inputs import OperatorShape
from mmlite.analysis.operators import (
    KEY_AWARE,
    OTHERS,
    STANDARD,
    benchmark_operators,
    contestants,
    scaled,
)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_contestants_compute_the_same(dtype):
    inputs = OperatorShape((64, 96), num_heads=4, head_dim=8, dtype=dtype).inputs()
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
        OperatorShape((32, 32), num_queries=5, num_heads=2, head_dim=8),
        rounds=2,
        start=lambda text, total: lambda: steps.append(total),
    )
    names = [(r.operator, r.backend, r.direction) for r in results]
    assert len(set(names)) == len(names)
    assert steps.count(steps[0]) == 2 * steps[0]  # the bar of each direction runs to its end
    for result in results:
        if result.backend == 'reference':
            assert result.over_reference.median == 1
    reasons = {name.partition(' ')[0] for name in left_out}
    assert reasons <= {STANDARD, KEY_AWARE}


def test_scaling_by_threads_restores_them():
    before, shape = torch.get_num_threads(), OperatorShape((32, 32), num_heads=2, head_dim=8)
    seconds = scaled(shape, 'threads', 1, rounds=2)
    assert f'{KEY_AWARE} (reference)' in seconds
    assert min(seconds.values()) > 0
    assert torch.get_num_threads() == before


def test_what_is_not_there_is_left_out_with_the_reason(monkeypatch):
    def broken(device):
        raise OSError(f'no kernel for {device}\nand much more')

    monkeypatch.setitem(OTHERS, 'broken', broken)
    _, left_out = contestants(OperatorShape((32, 32)).inputs(), 'cpu')
    assert left_out[f'{STANDARD} (broken)'] == 'no kernel for cpu'


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
from mmlite.analysis.operators import benchmark_operators
from mmlite.analysis.inputs import OperatorShape
results, left_out = benchmark_operators(OperatorShape((32, 32)), rounds=2, passes=('forward',))
assert 'ms_deform_attn (mmcv)' in left_out
assert all(result.over_mmcv is None for result in results)
"""


def test_works_with_torch_alone():
    """The operators can be measured where MMDetection is not installed."""
    subprocess.run([sys.executable, '-c', WITHOUT_MMDETECTION], check=True, timeout=120)
