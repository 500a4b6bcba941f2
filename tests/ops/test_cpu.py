import functools
import subprocess
import sys
import threading

import pytest
import torch
from operator_cases import PYRAMID, VARIANTS, BackendTests, Case
from torch import Tensor

from mmlite.ops import cpu, operator

AVAILABLE, REASON = cpu.status()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)


@pytest.fixture(params=cpu.isas(), autouse=True)
def isa(request):
    with cpu.use_isa(request.param):
        yield request.param


class TestCPU(BackendTests):
    backend = 'cpu'
    points_of_nonsense = (4, 20)


TESTS = TestCPU()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize(
    'sizes',
    [
        *(dict(dim=dim) for dim in (8, 63, 100)),
        *(dict(dim=8, points=points) for points in (8, 20)),
        *(dict(dim=8, queries=queries) for queries in (63, 64, 65, 200)),
        dict(dim=8, batch=3, heads=8),
    ],
    ids=str,
)
def test_vectors_chunks_and_blocks(variant, sizes):
    TESTS.check(Case(variant, **sizes))
    TESTS.check(Case(variant, **{**sizes, 'batch': 1}).from_offsets(boxes=True, shared=True))


@pytest.mark.parametrize('variant', VARIANTS)
def test_float64(variant):
    TESTS.check(Case(variant, dtype=torch.float64), 1e-12, 1e-12)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('sizes', [(2, 3, 150, 32, 3), (1, 1, 131, 24, 4), (1, 2, 131, 8, 20)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_same_bits_on_any_number_of_threads(variant, sizes, dtype):
    """With few heads for many threads, gradients are summed in blocks, in the same order."""
    batch, heads, queries, dim, points = sizes
    case = Case(variant, PYRAMID, batch, queries, heads, dim, points, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7, 16):
            torch.set_num_threads(count)
            results.append(case.run('cpu'))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for name, tensor in result.items():
            assert torch.equal(tensor, results[0][name]), name


@pytest.mark.parametrize(
    ('index', 'wrong', 'message'),
    [
        (0, None, 'query must be a tensor'),
        (2, None, 'value must be a tensor'),
        (3, [7, 9], 'spatial_shapes'),
        (3, [2**40] * 8, 'spatial_shapes'),
        (3, [-7, -9] * 4, 'spatial_shapes'),
        (5, torch.rand(2, 11, 3, 2, 4, 2), 'sampling_offsets must be for 4 levels'),
        (6, torch.rand(2, 11, 3, 4, 4), 'query and key must be None'),
        (7, [True] * 7, 'output_mask must have 6 entries; got 7'),
    ],
)
def test_operator_refuses_what_does_not_fit(index, wrong, message):
    """The operator checks again: a compiled graph calls it without the checks in front of it."""
    case = Case('shared key').from_offsets()
    arguments = [*case.arguments, [True] * 6]
    arguments[index] = wrong
    with pytest.raises(ValueError, match=message):
        operator.deform_attn_backward(case.grad_output, *arguments)
    if index < 7:
        with pytest.raises(ValueError, match=message):
            operator.deform_attn(*arguments[:-1])


def test_the_widest_head(isa):
    """Heads of 256 numbers run; wider ones are left to the formulation, or refused where forced."""
    TESTS.check(Case('standard', batch=1, heads=1, dim=256))
    wide = Case('standard', batch=1, heads=1, dim=257)
    with pytest.raises(ValueError, match='up to 256 numbers, and these have 257'):
        cpu.forward(*wide.arguments)


def test_interface_refuses_what_does_not_fit():
    """The library itself looks at what it is handed, whoever hands it over."""
    case = Case('key apart', batch=1)
    rows = {**case.inputs, 'output': torch.empty_like(case.inputs['query'])}

    def status(**changes) -> int:
        problem = cpu._problem(rows, case.arguments[3])
        for name, change in changes.items():
            setattr(problem, name, change)
        return cpu._kernels.mmlite_forward(problem)

    assert status() == 0
    nothing = cpu._Rows(None, 0, 0, 0)
    for name in ('query', 'key', 'value', 'locations', 'output'):
        assert status(**{name: nothing}) == 1, name
    for name, wrong in {
        'op': (-1, 3),
        'dtype': (-1, 3, 4),
        'point_dtype': (1, 2, 3, 7),
        'isa': (-1, 3),
        'threads': (0, -1),
        'dim': (0, 257, -5),
        'levels': (0, 2**40),
        'points': (0, 2**40),
        'heads': (0, -1),
        'batch': (-1,),
        'queries': (-1,),
    }.items():
        for change in wrong:
            assert status(**{name: change}) == 1, (name, change)
    assert status(tokens=case.inputs['value'].shape[1] + 1) == 2
    assert cpu._kernels.mmlite_forward(None) == cpu._kernels.mmlite_backward(None) == 1


def test_concurrent_calls(isa, monkeypatch):
    """Maps of other sizes in every thread, with room for those of one; every other backend."""
    sizes = functools.lru_cache(maxsize=1)(cpu._sizes.__wrapped__)
    monkeypatch.setattr(cpu, '_sizes', sizes)
    shapes = [((7 + n, 9), (4, 5 + n)) for n in range(3)]
    cases = [Case(variant, shapes[n], queries=100) for n in range(3) for variant in VARIANTS]
    backends = ['cpu', 'cpu', 'reference'] * 3
    expected = [case.run(backend) for case, backend in zip(cases, backends)]
    failures = []

    def repeat(case: Case, backend: str, wanted: dict[str, Tensor]) -> None:
        with cpu.use_isa(isa):  # the choice is the thread's own
            for _ in range(5):
                for name, tensor in case.run(backend).items():
                    if not torch.equal(tensor, wanted[name]):
                        failures.append(name)

    arguments = zip(cases, backends, expected)
    threads = [threading.Thread(target=repeat, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='counts threads in /proc')
def test_threads_are_those_of_torch():
    """No threads appear beside torch's own, and a forked child can call on several threads, too."""
    code = """
import os, torch
from mmlite import ops
torch.set_num_threads(2)
torch.randn(1 << 20).mul(2.0)
before = len(os.listdir('/proc/self/task'))
value, query = torch.randn(1, 12, 2, 16), torch.randn(1, 300, 2, 16)
locations = torch.rand(1, 300, 2, 1, 4, 2)
with ops.use_backend('cpu'):
    call = lambda: ops.key_aware_deform_attn(query, value, value, [(3, 4)], locations)
    expected = call()
    assert len(os.listdir('/proc/self/task')) == before, (before, os.listdir('/proc/self/task'))
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(call(), expected) else 1)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


def test_says_what_runs_and_why_not(isa):
    assert cpu.status() == (True, f'{isa} kernels on {torch.get_num_threads()} threads')
    with pytest.raises(ValueError, match='isa must be one of'), cpu.use_isa('mmx'):
        pass
    assert cpu.why_not(torch.zeros(1, 1, 1, 256), 100) == ''
    assert 'up to 256 numbers' in cpu.why_not(torch.zeros(1, 1, 1, 257), 1)
    assert 'complex64' in cpu.why_not(torch.zeros(1, 1, 1, 64, dtype=torch.complex64), 1)
    assert 'meta' in cpu.why_not(torch.zeros(1, 1, 1, 64, device='meta'), 1)


def test_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, '_INTERFACE', -1)
    kernels, why_not = cpu._load()
    assert kernels is None
    assert 'compiled from another version' in why_not
