"""The fused CPU kernels against the PyTorch formulation."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading

import operator_cases
import pytest
import torch
import torch.utils.checkpoint
from operator_cases import VARIANTS
from torch import Tensor

from mmlite import ops
from mmlite.ops import cpu, operator

AVAILABLE, REASON = cpu.status()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)


@pytest.fixture(params=cpu.isas(), autouse=True)
def isa(request):
    with cpu.use_isa(request.param):
        yield request.param


class Case(operator_cases.Case):
    def check(self, rtol: float = 1e-5, grad_rtol: float = 1e-4) -> None:
        self.compare(self.run('cpu'), self.run('reference'), rtol, grad_rtol)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dim', [8, 12, 16, 17, 24, 32, 33, 48, 63, 64, 100])
def test_head_dims(variant, dim):
    Case(variant, dim=dim).check()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize(
    'shapes', [((1, 1),), ((1, 7), (5, 1)), ((13, 11), (1, 1), (2, 2)), ((3, 2),) * 5]
)
@pytest.mark.parametrize('points', [1, 3, 4, 8])
def test_levels_and_points(variant, shapes, points):
    Case(variant, shapes=shapes, points=points, dim=16).check()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('queries', [1, 63, 64, 65, 200])
@pytest.mark.parametrize(('batch', 'heads'), [(1, 1), (3, 8)])
def test_queries_batches_heads(variant, queries, batch, heads):
    Case(variant, queries=queries, batch=batch, heads=heads, dim=8).check()


OFFSETS = [
    dict(),
    dict(shared=True),
    dict(boxes=True),
    dict(boxes=True, shared=True, batch=1),
    dict(batch=1),
]


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('kind', OFFSETS, ids=str)
@pytest.mark.parametrize('points', [1, 3, 4, 9])
def test_from_offsets(variant, kind, points):
    Case(variant, points=points, dim=16).from_offsets(**kind).check()
    Case(variant, points=points, dim=20, queries=130, batch=1).from_offsets(**kind).check()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('kind', OFFSETS, ids=str)
def test_from_offsets_gradcheck(variant, kind):
    case = Case(variant, ((3, 4), (1, 2)), 2, 3, 2, 5, 2, torch.float64, seed=3)
    case.from_offsets(**kind)
    tensors = [tensor.requires_grad_() for tensor in case.inputs.values()]
    with ops.use_backend('cpu'):
        assert torch.autograd.gradcheck(lambda *t: case.call(dict(zip(case.inputs, t))), tensors)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('boxes', [False, True])
def test_from_offsets_half_precision(variant, dtype, boxes):
    """Locations are formed in float32, whatever the offsets and reference points come in."""
    # Sizes that are powers of two: where the gradient jumps, both must see the same side.
    case = Case(variant, ((8, 4), (2, 2)), dtype=dtype).from_offsets(boxes)
    rounding = 0.5 * torch.finfo(dtype).eps
    for widened in (('reference_points',), ('sampling_offsets', 'weights')):
        actual, expected = case.run('cpu'), case.run('reference', widen=True)
        assert all(actual[name].dtype == tensor.dtype for name, tensor in case.inputs.items())
        case.compare(actual, expected, 1.01 * rounding, 1.01 * rounding)
        for name in widened:
            if name in case.inputs:
                case.inputs[name] = case.inputs[name].float()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dim', [16, 20, 32])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(variant, dim, dtype):
    """Computed in float32 and rounded once, output and gradients alike."""
    case = Case(variant, dim=dim, dtype=dtype)
    actual, expected = case.run('cpu'), case.run('reference', widen=True)
    assert {tensor.dtype for tensor in actual.values()} == {dtype}
    rounding = 0.5 * torch.finfo(dtype).eps
    case.compare(actual, expected, 1.01 * rounding, 1.01 * rounding)


@pytest.mark.parametrize('variant', VARIANTS)
def test_half_precision_with_float32_points(variant):
    case = Case(variant, dtype=torch.bfloat16)
    case.inputs['locations'] = case.inputs['locations'].float() + 1e-3
    actual, expected = case.run('cpu'), case.run('reference', widen=True)
    assert actual['locations'].dtype == torch.float32
    case.compare(actual, expected, 4e-3, 4e-3)


@pytest.mark.parametrize('variant', VARIANTS)
def test_float64(variant):
    Case(variant, dtype=torch.float64).check(1e-12, 1e-12)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('points', [2, 9])  # with 9, a head has more points than one chunk
def test_gradcheck(variant, points):
    case = Case(variant, ((3, 4), (1, 2)), 1, 3, 2, 5, points, torch.float64, seed=3)
    names = list(case.inputs)
    tensors = [tensor.requires_grad_() for tensor in case.inputs.values()]
    with ops.use_backend('cpu'):
        assert torch.autograd.gradcheck(lambda *t: case.call(dict(zip(names, t))), tensors)


@pytest.mark.parametrize('variant', VARIANTS)
def test_any_strides(variant):
    """Views of wider, transposed and expanded tensors give what their copies give."""
    case = Case(variant)
    expected = case.run('reference')
    for name, tensor in case.inputs.items():
        if name in ('locations', 'weights'):
            case.inputs[name] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        elif name == 'query':
            case.inputs[name] = torch.cat([tensor, tensor], -2)[:, :, : tensor.shape[2]]
        else:
            case.inputs[name] = tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    case.compare(case.run('cpu'), expected, 1e-5, 1e-4)

    case.inputs['locations'] = case.inputs['locations'].flip(-1).contiguous().flip(-1)
    case.inputs['value'] = case.inputs['value'][:, :, :1].expand(-1, -1, 3, -1)
    case.grad_output = case.grad_output[:1, :1].expand_as(case.grad_output)
    case.check()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('wild', [float('nan'), float('inf'), -float('inf'), 1e30, -1e30, 5.0])
def test_wild_locations_count_as_outside(variant, wild):
    case = Case(variant, points=5)
    locations = case.inputs['locations']
    locations[:, 0] = wild
    locations[:, 1, :, :, ::2, 0] = wild
    locations[:, 2, :, 1, 1, 1] = wild
    case.check()
    grad = case.run('cpu')['locations']
    assert grad.isfinite().all() and not grad[:, 0].any()


@pytest.mark.parametrize('variant', VARIANTS)
def test_rows_not_sampled_are_not_read(variant):
    """A row that no point touches may hold anything."""
    case = Case(variant, ((4, 4),), 1, 7, 1, 32, 4)
    case.inputs['locations'] = case.inputs['locations'].clamp(-0.2, 0.3)
    case.inputs['locations'][0, 0] = -3
    expected = case.run('reference')
    for name in ('value', 'key'):
        if name in case.inputs:
            case.inputs[name][0, 12:] = float('nan')
    actual = case.run('cpu')
    case.compare(actual, expected, 1e-5, 1e-4)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_borders_and_pixel_centres(variant, dtype):
    """Locations exactly on pixel centres, on the borders, and one step beyond them."""
    case = operator_cases.border_case(variant, dtype)
    case.compare(case.run('cpu'), case.run('reference'), 1e-5, 1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('odd', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('points', [4, 20])
def test_features_that_are_not_finite(variant, odd, points):
    """As in the reference: on borders, with weights of zero, in every gradient."""
    for case in operator_cases.infinite_cases(variant, odd, points):
        case.compare_bits_of_nonsense(case.run('cpu'), case.run('reference'))


@pytest.mark.parametrize('variant', VARIANTS)
def test_only_the_gradients_asked_for(variant):
    case = Case(variant, queries=70)
    expected = case.run('cpu')
    for name in case.inputs:
        inputs = {n: t.clone().requires_grad_(n == name) for n, t in case.inputs.items()}
        (grad,) = torch.autograd.grad(case.call(inputs), inputs[name], case.grad_output)
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dim', [8, 24, 32, 64])
@pytest.mark.parametrize(('batch', 'heads', 'points'), [(1, 1, 4), (2, 3, 3), (1, 2, 20)])
def test_backward_has_the_same_bits_in_blocks(variant, dim, batch, heads, points):
    """Few heads for many threads: the gradients are summed in blocks, in the same order."""
    case = Case(variant, queries=131, batch=batch, heads=heads, dim=dim, points=points)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run('cpu')
        torch.set_num_threads(16)
        for name, tensor in case.run('cpu').items():
            assert torch.equal(tensor, expected[name]), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize('variant', ['shared key', 'key apart'])
def test_large_logits(variant):
    """The softmax neither overflows nor loses the small weights, over several chunks."""
    case = Case(variant, points=11)
    case.inputs['query'] = case.inputs['query'] * 200
    case.check()


@pytest.mark.parametrize('variant', VARIANTS)
def test_nan_reaches_the_output(variant):
    case = Case(variant, batch=1, heads=1)
    case.inputs['value'][:] = float('nan')
    assert case.run('cpu')['output'].isnan().any()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_same_bits_on_any_number_of_threads(variant, dtype):
    case = Case(variant, queries=150, dtype=dtype)
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


@pytest.mark.parametrize('variant', VARIANTS)
def test_opcheck(variant):
    if not hasattr(torch.library, 'opcheck'):
        pytest.skip('torch.library.opcheck came with torch 2.4')
    for case in (Case(variant, batch=1), Case(variant, batch=1).from_offsets()):
        backward = (case.grad_output, *case.arguments, [True] * 6)
        torch.library.opcheck(operator.deform_attn_backward, backward)
        for tensor in case.inputs.values():
            tensor.requires_grad_()
        torch.library.opcheck(operator.deform_attn, case.arguments)


@pytest.mark.skipif(
    torch.__version__ < (2, 2), reason='the compiler of torch 2.1 does not know `is` and sets'
)
@pytest.mark.parametrize('variant', VARIANTS)
def test_compile_fullgraph(variant, isa):
    if isa != cpu.isas()[-1]:
        pytest.skip('the graph is the same for every instruction set')
    case = Case(variant)
    expected = case.run('cpu')
    eager_call = case.call
    case.call = torch.compile(eager_call, fullgraph=True, backend='aot_eager')
    case.compare(case.run('cpu'), expected, 0, 0)


@pytest.mark.parametrize('variant', VARIANTS)
def test_activation_checkpointing(variant):
    case = Case(variant)
    expected = case.run('cpu')
    call = case.call
    case.call = lambda inputs: torch.utils.checkpoint.checkpoint(call, inputs, use_reentrant=False)
    case.compare(case.run('cpu'), expected, 0, 0)


def test_operator_refuses_shapes_that_do_not_fit():
    """The operator checks again: a compiled graph calls it without the checks in front of it."""
    case = Case('shared key')
    inputs = case.inputs
    for wrong in ([(7, 9)], [(7, 9), (4, 5), (2, 3), (1, 2)], [(2**40, 2**40)] * 4, [(-7, -9)] * 4):
        with pytest.raises(ValueError, match='spatial_shapes'):
            operator.deform_attn(
                inputs['query'],
                None,
                inputs['value'],
                [size for shape in wrong for size in shape],
                None,
                inputs['locations'][:, :, :, : len(wrong)],
                None,
            )


def test_operator_refuses_what_does_not_go_together():
    arguments = Case('standard').arguments
    with pytest.raises(ValueError, match='query and key must be None'):
        operator.deform_attn(None, arguments[2], *arguments[2:])
    with pytest.raises(ValueError, match='output_mask must have 6 entries; got 7'):
        grad_output = Case('standard').grad_output
        operator.deform_attn_backward(grad_output, *arguments, [True] * 7)
    arguments = Case('shared key').from_offsets().arguments
    arguments[5] = arguments[5][:, :, :, :2]  # offsets for two of the four levels
    with pytest.raises(ValueError, match='sampling_offsets must be for 4 levels'):
        operator.deform_attn(*arguments)


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


def test_no_queries():
    case = Case('shared key', queries=0)
    assert case.run('cpu')['output'].shape == (2, 0, 96)


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


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_after_fork(tmp_path):
    """A child of a process that has used its threads can call the kernels on several threads."""
    code = """
import os, torch
from mmlite import ops
torch.set_num_threads(2)
value = torch.randn(1, 12, 2, 16)
query = torch.randn(1, 300, 2, 16)
locations = torch.rand(1, 300, 2, 1, 4, 2)
with ops.use_backend('cpu'):
    call = lambda: ops.key_aware_deform_attn(query, value, value, [(3, 4)], locations)
    expected = call()
    child = os.fork()
    if child == 0:
        os._exit(0 if (call() - expected).numpy().any() == False else 1)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


def test_data_loader_workers():
    class Dataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            return Case('shared key', seed=index).run('cpu')['output']

    loaded = list(torch.utils.data.DataLoader(Dataset(), batch_size=None, num_workers=2))
    for index, output in enumerate(loaded):
        assert torch.equal(output, Dataset()[index])


def test_threads_are_those_of_torch():
    """No threads appear beside torch's own."""
    if not sys.platform.startswith('linux'):
        pytest.skip('counts threads in /proc')
    code = """
import os, torch
from mmlite import ops
torch.set_num_threads(2)
torch.randn(1 << 20).mul(2.0)
before = len(os.listdir('/proc/self/task'))
value = torch.randn(1, 12, 2, 16)
locations = torch.rand(1, 300, 2, 1, 4, 2)
with ops.use_backend('cpu'):
    ops.ms_deform_attn(value, [(3, 4)], locations, torch.rand(1, 300, 2, 1, 4))
assert len(os.listdir('/proc/self/task')) == before, (before, os.listdir('/proc/self/task'))
"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


def test_status_names_the_instruction_set(isa):
    assert cpu.status() == (True, f'{isa} kernels on {torch.get_num_threads()} threads')


def test_unknown_isa():
    with pytest.raises(ValueError, match='isa must be one of'), cpu.use_isa('mmx'):
        pass


def test_says_why_not():
    assert cpu.why_not(torch.zeros(1, 1, 1, 64), 100) == ''
    assert 'up to 256 numbers' in cpu.why_not(torch.zeros(1, 1, 1, 257), 1)
    assert 'complex64' in cpu.why_not(torch.zeros(1, 1, 1, 64, dtype=torch.complex64), 1)
    assert 'meta' in cpu.why_not(torch.zeros(1, 1, 1, 64, device='meta'), 1)


def test_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, '_INTERFACE', -1)
    kernels, why_not = cpu._load()
    assert kernels is None
    assert 'compiled from another version' in why_not
