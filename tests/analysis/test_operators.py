import subprocess
import sys

import pytest
import torch

from mmlite.analysis.inputs import operator_inputs
from mmlite.analysis.operators import KEY_AWARE, OTHERS, STANDARD, contestants


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_contestants_compute_the_same(dtype):
    inputs = operator_inputs((64, 96), num_heads=2, head_dim=8, dtype=dtype)
    found, _ = contestants([inputs], 'cpu')
    outputs = {(each.operator, each.backend): each.run(inputs) for each in found}
    assert {(STANDARD, 'mmcv'), (KEY_AWARE, 'reference')} <= outputs.keys()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for (operator, _), output in outputs.items():
        expected = outputs[operator, 'reference']
        torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


def test_what_is_not_there_is_left_out_with_the_reason(monkeypatch):
    def broken(device):
        raise OSError(f'no kernel for {device}\nand much more')

    monkeypatch.setitem(OTHERS, 'broken', broken)
    found, left_out = contestants([operator_inputs((32, 32))], 'cpu')
    assert left_out[f'{STANDARD} (broken)'] == 'no kernel for cpu'
    assert 'broken' not in {each.backend for each in found}


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
from mmlite.analysis.timing import Setting
report = benchmark_operators(Setting((32, 32), rounds=2, parts=('forward',)))
assert any('ms_deform_attn (mmcv)' in note for note in report.notes)
assert all(list(each.timings['forward'][1].faster) == ['over PyTorch'] for each in report.results)
"""


def test_works_with_torch_alone():
    """The operators can be measured where MMDetection is not installed."""
    subprocess.run([sys.executable, '-c', WITHOUT_MMDETECTION], check=True, timeout=120)
