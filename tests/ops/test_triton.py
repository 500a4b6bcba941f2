"""The fused Triton kernels against the PyTorch formulation.

Without a CUDA device the kernels run in Triton's interpreter, on CPU tensors and called directly;
tests/conftest.py turns it on. With one, the same sweep runs on the device, and the rest with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from operator_cases import PYRAMID, BackendTests, Case
from torch import Tensor

from mmlite.ops import operator
from mmlite.ops import triton as backend
from mmlite.ops.triton import launch

triton = pytest.importorskip('triton', minversion='3.0')

AVAILABLE, REASON = backend.status()
DEVICE = 'cuda' if AVAILABLE else 'cpu'


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class TestTriton(BackendTests):
    backend = 'triton'
    device = DEVICE
    is_registered = AVAILABLE
    # The interpreter cuts bfloat16 off instead of rounding it, and takes its time.
    ulps = 0.505 if AVAILABLE else 1.01
    points_of_nonsense, queries_of_nonsense, step_of_nonsense = (2,), 16, 3

    def run(self, case: Case, only: str | None = None) -> dict[str, Tensor]:
        """From the functions that are registered for CUDA; the sum in order must agree."""
        results = case.run_module(launch, only)
        if only not in (None, 'key', 'value'):
            return results
        with deterministic():
            ordered = case.run_module(launch, only)
        for name, tensor in results.items():
            ulp = 2 * torch.finfo(tensor.dtype).eps
            tolerance = dict(rtol=max(ulp, 1e-4), atol=max(ulp, 1e-4), equal_nan=True)
            torch.testing.assert_close(ordered[name], tensor, **tolerance)
        return results


TESTS = TestTriton()


def test_wide_indices(monkeypatch):
    """Features of one image beyond the range of int32 are indexed with int64."""
    case = Case('key apart', PYRAMID[2:], queries=3, heads=2, dim=8, device=DEVICE)
    for elements, index in ((2**31, triton.language.int32), (1, triton.language.int64)):
        monkeypatch.setattr(launch, '_INT32_ELEMENTS', elements)
        assert launch._prepare(*case.arguments[2:6])[1]['INDEX'] == index
    TESTS.check(case)


@pytest.mark.parametrize('config', [(1, 1), (4, 1), (16, 8)], ids=str)
def test_every_configuration_is_right(config, monkeypatch):
    assert launch.configuration(4, 32) == (16, 4)
    assert launch.configuration(4, 32, wide=True) == (8, 1)
    assert launch.configuration(16, 256) == (1, 4)
    monkeypatch.setattr(launch, 'configuration', lambda *args: config)
    TESTS.check(Case('shared key', PYRAMID[2:], 1, 5, 2, 8, device=DEVICE))


@pytest.mark.parametrize(
    ('variant', 'capability', 'wide'),
    [
        ('shared key', (8, 0), True),
        ('standard', (8, 9), True),
        ('key apart', (8, 0), False),
        ('shared key', (9, 0), False),
    ],
)
def test_backward_is_wide_where_that_saves_instructions(variant, capability, wide, monkeypatch):
    monkeypatch.setattr(launch, '_capability_of', lambda tensor: capability)
    with mock.patch.object(launch, 'configuration', wraps=launch.configuration) as chosen:
        TESTS.check(Case(variant, PYRAMID[2:], 1, 5, 2, 8, device=DEVICE))
    assert chosen.call_args.args[2] == wide


@pytest.mark.parametrize(
    ('cuda', 'module', 'problem'),
    [
        (None, triton, 'this PyTorch is built without CUDA'),
        ('12.8', None, 'Triton is not installed'),
        ('12.1', SimpleNamespace(__version__='2.1.0'), 'Triton 2.1.0 is too old'),
        ('12.8', SimpleNamespace(__version__='3.0.0+git1'), ''),
    ],
)
def test_status_says_why_not(monkeypatch, cuda, module, problem):
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(torch.version, 'hip', None, raising=False)
    monkeypatch.setitem(sys.modules, 'triton', module)
    assert backend._problem().startswith(problem) and bool(backend._problem()) == bool(problem)
    monkeypatch.setattr(backend, '_PROBLEM', problem)
    assert problem == '' or backend.status() == (False, problem)


def on_gpu(dtype: torch.dtype = torch.float16) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=SimpleNamespace(index=0))


def test_says_why_not(monkeypatch):
    monkeypatch.setattr(backend, '_PROBLEM', '')
    for device in ('cpu', 'meta'):
        reason = backend.why_not(torch.zeros(1, 1, 1, 8, device=device), 1)
        assert reason == f'it runs on CUDA, and value is on {device}'
    monkeypatch.setattr(backend, '_examine', lambda index: '')
    assert backend.why_not(on_gpu(), 8) == ''
    assert backend.why_not(on_gpu(), 9) == 'it serves up to 8 levels, and there are 9'
    assert backend.why_not(on_gpu(torch.float64), 1) == 'it has no kernels for torch.float64'


@pytest.mark.parametrize(
    ('hip', 'capability', 'setting', 'problem'),
    [
        (None, (9, 0), '0', ''),
        (None, (7, 0), '0', ''),
        (None, (6, 1), '0', 'Some GPU has compute capability 6.1'),
        ('6.2', (9, 4), '0', 'the kernels were never tried on AMD GPUs (Some GPU)'),
        ('6.2', (9, 4), '1', ''),
    ],
)
def test_devices_are_looked_at_first(monkeypatch, hip, capability, setting, problem):
    monkeypatch.setattr(torch.version, 'hip', hip, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index=0: 'Some GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
    monkeypatch.setenv('MMLITE_AMD', setting)
    monkeypatch.setattr(backend, '_PROBLEM', '')
    monkeypatch.setattr(backend, '_examine', backend._examine.__wrapped__)
    reason = backend.why_not(on_gpu(), 4)
    assert reason.startswith(problem) and bool(reason) == bool(problem)
    available, reason = backend.status()
    assert available == (not problem) and (available or reason.startswith(problem))


def test_a_graph_does_not_trace_into_the_look_at_the_device(monkeypatch):
    monkeypatch.setattr(backend, '_examine', lambda index: f'{os.getpid()} {index}')

    def function(tensor):
        return tensor + 1 if backend._device_problem(0) else tensor

    compiled = torch.compile(function, backend='eager', fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1


def test_compiles_for_gpus():
    """The kernels compile for Ampere and Hopper, load 128 bits at once and spill next to nothing.

    In a process of its own, where the interpreter is off.
    """
    environment = {**os.environ, 'TRITON_INTERPRET': '0'}
    script = Path(__file__).parents[2] / 'benchmarks/kernel_resources.py'
    if not Path(triton.__file__).with_name('backends').joinpath('nvidia/bin/cuobjdump').exists():
        pytest.skip('this Triton comes without the CUDA tools')
    subprocess.run([sys.executable, script, '--check'], check=True, env=environment, timeout=600)


@pytest.mark.skipif(not AVAILABLE, reason=REASON)
class TestOnDevice:
    variant = BackendTests.variant

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
    def test_dispatch(self, variant, dtype):
        """CUDA tensors reach these kernels through the public operators, unasked."""
        case = Case(variant, dtype=dtype, device=DEVICE)
        expected = case.run('reference', widen=True)
        rtol = 1e-4 if dtype == torch.float32 else 0.505 * torch.finfo(dtype).eps
        case.compare(case.run('triton'), expected, rtol, rtol)
        with mock.patch.object(operator, 'deform_attn') as fused:
            case.call(case.inputs)
        fused.assert_called_once()

    def test_cuda_graph(self, variant):
        """Forward and backward replay on new inputs."""
        case = Case(variant, device=DEVICE)
        case.run_module(launch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.run_module(launch)
        for tensor in case.inputs.values():
            tensor.copy_(torch.rand_like(tensor))
        graph.replay()
        case.compare(captured, case.run('reference'), 1e-5, 1e-4)

    def test_no_synchronisation(self):
        case = Case('shared key', device=DEVICE)
        case.run_module(launch)
        torch.cuda.set_sync_debug_mode('error')
        try:
            case.run_module(launch)
        finally:
            torch.cuda.set_sync_debug_mode('default')

    def test_stream(self, variant):
        case = Case(variant, device=DEVICE)
        expected = case.run('reference')
        case.run_module(launch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # A launch on any other stream would read what follows early.
            torch.cuda._sleep(10_000_000)
            for tensor in case.inputs.values():
                tensor.mul_(1)
            actual = case.run_module(launch)
        stream.synchronize()
        case.compare(actual, expected, 1e-5, 1e-4)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
    def test_device_that_is_not_current(self, variant):
        case = Case(variant, device='cuda:1')
        case.compare(case.run_module(launch), case.run('reference'), 1e-5, 1e-4)

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_autocast(self, dtype):
        case = Case('shared key', device=DEVICE)
        with torch.autocast('cuda', dtype):
            actual = case.run('triton')
        assert actual['output'].dtype == dtype
        assert actual['value'].dtype == actual['locations'].dtype == torch.float32
        case.compare(actual, case.run('reference'), 0.02, 0.05)

    def test_deterministic_runs_repeat_bit_for_bit(self, variant):
        """Many queries on few pixels, where atomics would come in another order each time."""
        case = Case(variant, ((3, 4), (1, 2)), queries=2000, device=DEVICE)
        with deterministic():
            first = case.run_module(launch)
            for _ in range(5):
                for name, tensor in case.run_module(launch).items():
                    assert torch.equal(tensor, first[name]), name
