"""The fused Triton kernels against the PyTorch formulation.

Without a CUDA device the kernels run in Triton's interpreter, on CPU tensors and called directly;
tests/conftest.py turns it on. With one, the same sweep runs on the device, and the rest with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import operator_cases
import pytest
import torch
import torch.utils.checkpoint
from operator_cases import PYRAMID, VARIANTS, Case
from torch import Tensor

from mmlite.ops import operator
from mmlite.ops import triton as backend
from mmlite.ops.triton import launch

triton = pytest.importorskip('triton', minversion='3.0')

AVAILABLE, REASON = backend.status()
DEVICE = 'cuda' if AVAILABLE else 'cpu'
on_device = pytest.mark.skipif(not AVAILABLE, reason=REASON)
DETERMINISTIC = pytest.mark.parametrize('deterministic', [False, True], indirect=True)


@pytest.fixture(autouse=True)
def deterministic(request):
    """Whether the backward is the deterministic one."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(getattr(request, 'param', False))
    yield
    torch.use_deterministic_algorithms(previous)


def run(case: Case) -> dict[str, Tensor]:
    """Output and all gradients by name, from the functions that are registered for CUDA."""
    return case.run_module(launch)


def check(case: Case, rtol: float = 1e-5, grad_rtol: float = 1e-4) -> None:
    case.compare(run(case), case.run('reference'), rtol, grad_rtol)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dim', [8, 12, 17, 24, 32, 48, 64])
def test_head_dims(variant, dim):
    check(Case(variant, PYRAMID[1:3], 1, 5, 2, dim, 2, device=DEVICE))


@pytest.mark.parametrize('deterministic', [True], indirect=True)
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dim', [12, 32])
def test_head_dims_deterministic(variant, dim, deterministic):
    check(Case(variant, PYRAMID[1:3], 1, 5, 2, dim, 2, device=DEVICE))


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize(
    'shapes',
    [((1, 1),), ((1, 7), (5, 1)), ((3, 2), (1, 4), (2, 2), (1, 1), (2, 1), (1, 3), (4, 1), (1, 2))],
)
@pytest.mark.parametrize('points', [1, 3, 4])
def test_levels_and_points(variant, shapes, points):
    check(Case(variant, shapes, 1, 5, 2, 8, points, device=DEVICE))


@DETERMINISTIC
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('queries', [1, 17])
def test_queries_batches_heads(variant, queries, deterministic):
    check(Case(variant, ((4, 3), (2, 2)), 2, queries, 3, 8, 3, device=DEVICE))


@DETERMINISTIC
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('float32_points', [False, True])
def test_half_precision(variant, dtype, float32_points, deterministic):
    """Computed in float32 and rounded once, output and gradients alike."""
    case = Case(variant, PYRAMID[2:], 1, 5, 2, 16, 3, dtype, device=DEVICE)
    if float32_points:
        case.inputs['locations'] = case.inputs['locations'].float() + 1e-3
    actual, expected = run(case), case.run('reference', widen=True)
    for name, tensor in actual.items():
        wanted = case.grad_output if name == 'output' else case.inputs[name]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
    # The interpreter cuts bfloat16 off instead of rounding it.
    ulps = 0.505 if AVAILABLE or dtype == torch.float16 else 1.01
    rounding = ulps * torch.finfo(dtype).eps
    case.compare(actual, expected, rounding, rounding)


@DETERMINISTIC
@pytest.mark.parametrize('variant', VARIANTS)
def test_wild_locations_count_as_outside(variant, deterministic):
    wild = torch.tensor([float('nan'), float('inf'), -float('inf'), 1e30, -1e30, 5.0])
    case = Case(variant, ((4, 5), (2, 3)), 1, 14, 1, 8, 3, device=DEVICE)
    locations = case.inputs['locations']
    locations[:, :6] = wild.view(6, 1, 1, 1, 1).to(DEVICE)
    locations[0, 6:12, 0, 0, 1, 0] = wild.to(DEVICE)
    locations[0, 6:12, 0, 1, 2, 1] = wild.to(DEVICE)
    check(case)
    grad = run(case)['locations']
    assert grad.isfinite().all() and not grad[:, :6].any()


@pytest.mark.parametrize('variant', VARIANTS)
def test_rows_not_sampled_are_not_read(variant):
    """A row that no point touches may hold anything."""
    case = Case(variant, ((4, 4),), 1, 7, 1, 8, 4, device=DEVICE)
    case.inputs['locations'] = case.inputs['locations'].clamp(-0.2, 0.3)
    case.inputs['locations'][0, 0] = -3
    expected = case.run('reference')
    for name in ('value', 'key'):
        if name in case.inputs:
            case.inputs[name][0, 12:] = float('nan')
    case.compare(run(case), expected, 1e-5, 1e-4)


@pytest.mark.parametrize('variant', VARIANTS)
def test_borders_and_pixel_centres(variant):
    """Locations exactly on pixel centres, on the borders, and one step beyond them."""
    check(operator_cases.border_case(variant, torch.float32, DEVICE))


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('odd', [float('nan'), float('inf'), -float('inf')])
def test_features_that_are_not_finite(variant, odd):
    cases = list(operator_cases.infinite_cases(variant, odd, 2, queries=16, device=DEVICE))
    for case in cases[:: len(cases) // 4]:  # the interpreter takes its time
        case.compare_bits_of_nonsense(run(case), case.run('reference'))


@DETERMINISTIC
@pytest.mark.parametrize('variant', VARIANTS)
def test_only_the_gradients_asked_for(variant, deterministic):
    case = Case(variant, PYRAMID[2:], queries=3, heads=2, dim=8, device=DEVICE)
    expected = run(case)
    for index, name in enumerate(expected):
        if index:
            grads = case.run_module(launch, only=name)
            assert grads[name].numel() and sum(bool(grad.numel()) for grad in grads.values()) == 2
            case.compare({name: grads[name]}, {name: expected[name]}, 1e-6, 1e-6)


@pytest.mark.parametrize('variant', ['shared key', 'key apart'])
def test_large_logits(variant):
    """The softmax neither overflows nor loses the small weights from level to level."""
    case = Case(variant, queries=5, heads=1, dim=16, device=DEVICE)
    case.inputs['query'] = case.inputs['query'] * 200
    check(case)


@pytest.mark.parametrize('variant', VARIANTS)
def test_nan_reaches_the_output(variant):
    case = Case(variant, batch=1, queries=3, heads=1, dim=8, device=DEVICE)
    case.inputs['value'][:] = float('nan')
    assert run(case)['output'].isnan().any()


@DETERMINISTIC
@pytest.mark.parametrize('variant', VARIANTS)
def test_strided_inputs(variant, deterministic):
    """Transposed and expanded tensors give what their copies give."""
    case = Case(variant, PYRAMID[2:], queries=3, heads=2, dim=8, device=DEVICE)
    expected = case.run('reference')
    for name, tensor in case.inputs.items():
        case.inputs[name] = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    case.compare(run(case), expected, 1e-5, 1e-4)
    case.grad_output = case.grad_output[:1, :1].expand_as(case.grad_output)
    check(case)


@DETERMINISTIC
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('empty', ['batch', 'queries'])
def test_nothing_to_do(variant, empty, deterministic):
    case = Case(variant, **{empty: 0}, device=DEVICE)
    results = run(case)
    assert results['output'].shape == case.grad_output.shape
    assert results['value'].shape == case.inputs['value'].shape
    assert not results['value'].any()


@DETERMINISTIC
def test_wide_indices(deterministic, monkeypatch):
    """Features of one image beyond the range of int32 are indexed with int64."""
    monkeypatch.setattr(launch, '_INT32_ELEMENTS', 1)
    check(Case('key apart', PYRAMID[2:], queries=3, heads=2, dim=8, device=DEVICE))


@DETERMINISTIC
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('boxes', [False, True])
@pytest.mark.parametrize('shared', [False, True])
def test_from_offsets(variant, boxes, shared, deterministic):
    """Reference points of 2 and 4 numbers, offsets of each level or one set for all of them."""
    case = Case(variant, PYRAMID[1:3], 2, 5, 2, 12, 3, device=DEVICE)
    check(case.from_offsets(boxes, shared))


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('boxes', [False, True])
def test_reference_points_that_serve_all_images(variant, boxes):
    check(Case(variant, PYRAMID[1:], 2, 3, 2, 8, 4, device=DEVICE).from_offsets(boxes, batch=1))


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_offsets(variant, dtype):
    case = Case(variant, PYRAMID[2:], 1, 5, 2, 16, 3, dtype, device=DEVICE).from_offsets(True)
    actual, expected = run(case), case.run('reference', widen=True)
    for name, wanted in case.inputs.items():
        assert (actual[name].dtype, actual[name].shape) == (wanted.dtype, wanted.shape), name
    ulps = 0.505 if AVAILABLE or dtype == torch.float16 else 1.01
    rounding = ulps * torch.finfo(dtype).eps
    case.compare(actual, expected, rounding, rounding)


@DETERMINISTIC
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('boxes', [False, True])
def test_wild_offsets_count_as_outside(variant, boxes, deterministic):
    """Offsets that are no numbers move nothing, and no gradient is NaN because of them."""
    wild = torch.tensor([float('nan'), float('inf'), -float('inf'), 1e30, -1e30])
    case = Case(variant, ((4, 5), (2, 3)), 1, 5, 1, 8, 3, device=DEVICE).from_offsets(boxes)
    case.inputs['sampling_offsets'][:] = wild.view(5, 1, 1, 1, 1).to(DEVICE)
    actual = run(case)
    case.inputs['sampling_offsets'][:] = 1e4
    expected = run(case)
    for name in ('output', 'value', 'reference_points', 'sampling_offsets'):
        assert torch.equal(actual[name], expected[name]), name
    assert not actual['sampling_offsets'].any() and not actual['reference_points'].any()


@pytest.mark.parametrize('config', [(1, 1), (4, 1), (16, 8)], ids=str)
def test_every_configuration_is_right(config, monkeypatch):
    monkeypatch.setattr(launch, 'configuration', lambda *args, **kwargs: launch.Config(*config))
    check(Case('shared key', PYRAMID[2:], 1, 5, 2, 8, device=DEVICE))


def test_configurations():
    assert launch.configuration(4, 32) == (16, 4)
    assert launch.configuration(4, 32, wide=True) == (8, 1)
    assert launch.configuration(16, 256) == (1, 4)


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
        check(Case(variant, PYRAMID[2:], 1, 5, 2, 8, device=DEVICE))
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


def test_says_why_not(monkeypatch):
    monkeypatch.setattr(backend, '_PROBLEM', '')
    for device in ('cpu', 'meta'):
        reason = backend.why_not(torch.zeros(1, 1, 1, 8, device=device), 1)
        assert reason == f'it runs on CUDA, and value is on {device}'
    device = SimpleNamespace(index=0)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=device)
    monkeypatch.setattr(backend, '_examine', lambda index: '')
    assert backend.why_not(on_gpu, 8) == ''
    assert backend.why_not(on_gpu, 9) == 'it serves up to 8 levels, and there are 9'
    on_gpu.dtype = torch.float64
    assert backend.why_not(on_gpu, 1) == 'it has no kernels for torch.float64'


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
    device = SimpleNamespace(index=0)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=device)
    assert backend.why_not(on_gpu, 4).startswith(problem)
    assert bool(backend.why_not(on_gpu, 4)) == bool(problem)
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
    script = Path(operator_cases.__file__).with_name('triton_compile.py')
    if not Path(triton.__file__).with_name('backends').joinpath('nvidia/bin/cuobjdump').exists():
        pytest.skip('this Triton comes without the CUDA tools')
    subprocess.run([sys.executable, script, '--check'], check=True, env=environment, timeout=600)


@on_device
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_dispatch(variant, dtype):
    """CUDA tensors reach these kernels through the public operators, unasked."""
    case = Case(variant, dtype=dtype, device=DEVICE)
    expected = case.run('reference', widen=True)
    rtol = 1e-4 if dtype == torch.float32 else 0.505 * torch.finfo(dtype).eps
    case.compare(case.run('triton'), expected, rtol, rtol)
    with mock.patch.object(operator, 'deform_attn') as fused:
        case.call(case.inputs)
    fused.assert_called_once()


@on_device
@pytest.mark.parametrize('variant', VARIANTS)
def test_opcheck(variant):
    case = Case(variant, device=DEVICE)
    for tensor in case.inputs.values():
        tensor.requires_grad_()
    torch.library.opcheck(operator.deform_attn, case.arguments)


@on_device
@pytest.mark.parametrize('variant', VARIANTS)
def test_compile_fullgraph(variant):
    case = Case(variant, device=DEVICE)
    expected = case.run('triton')
    case.call = torch.compile(case.call, fullgraph=True)
    case.compare(case.run('triton'), expected, 1e-6, 1e-5)


@on_device
@pytest.mark.parametrize('variant', VARIANTS)
def test_cuda_graph(variant):
    """Forward and backward replay on new inputs."""
    case = Case(variant, device=DEVICE)
    run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case)
    for tensor in case.inputs.values():
        tensor.copy_(torch.rand_like(tensor))
    graph.replay()
    case.compare(captured, case.run('reference'), 1e-5, 1e-4)


@on_device
def test_no_synchronisation():
    case = Case('shared key', device=DEVICE)
    run(case)
    torch.cuda.set_sync_debug_mode('error')
    try:
        run(case)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@on_device
@pytest.mark.parametrize('variant', VARIANTS)
def test_stream(variant):
    case = Case(variant, device=DEVICE)
    expected = case.run('reference')
    run(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a launch on any other stream would read what follows early
        for tensor in case.inputs.values():
            tensor.mul_(1)
        actual = run(case)
    stream.synchronize()
    case.compare(actual, expected, 1e-5, 1e-4)


@on_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
@pytest.mark.parametrize('variant', VARIANTS)
def test_device_that_is_not_current(variant):
    case = Case(variant, device='cuda:1')
    case.compare(run(case), case.run('reference'), 1e-5, 1e-4)


@on_device
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    case = Case('shared key', device=DEVICE)
    with torch.autocast('cuda', dtype):
        actual = case.run('triton')
    assert actual['output'].dtype == dtype
    assert actual['value'].dtype == actual['locations'].dtype == torch.float32
    case.compare(actual, case.run('reference'), 0.02, 0.05)


@on_device
@pytest.mark.parametrize('variant', VARIANTS)
def test_activation_checkpointing(variant):
    case = Case(variant, device=DEVICE)
    expected = case.run('triton')
    call = case.call
    case.call = lambda inputs: torch.utils.checkpoint.checkpoint(call, inputs, use_reentrant=False)
    case.compare(case.run('triton'), expected, 0, 1e-5)


@on_device
@pytest.mark.parametrize('deterministic', [True], indirect=True)
@pytest.mark.parametrize('variant', VARIANTS)
def test_deterministic_runs_repeat_bit_for_bit(variant, deterministic):
    """Many queries on few pixels, where atomics would come in another order each time."""
    case = Case(variant, ((3, 4), (1, 2)), queries=2000, device=DEVICE)
    first = run(case)
    for _ in range(5):
        for name, tensor in run(case).items():
            assert torch.equal(tensor, first[name]), name
