"""The fused Triton kernels against the PyTorch formulation.

Without a CUDA device the kernels run in Triton's interpreter, on CPU tensors and called directly;
tests/conftest.py turns it on. With one, the same sweep runs on the device, and the rest with it.
"""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from operator_cases import PYRAMID, VARIANTS, Case
from torch import Tensor

from mmlite.ops import triton as backend

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
    inputs, shapes = case.inputs, case.spatial_shapes
    value, locations = inputs['value'], inputs['locations']
    if case.variant == 'standard':
        args = (value, shapes, locations, inputs['weights'])
        output = backend.ms_deform_attn(*args)
        grads = backend.ms_deform_attn_backward(case.grad_output, *args)
        return dict(zip(('output', 'value', 'locations', 'weights'), (output, *grads)))
    args = (inputs['query'], inputs.get('key'), value, shapes, locations)
    output = backend.key_aware_deform_attn(*args)
    grads = backend.key_aware_deform_attn_backward(case.grad_output, *args)
    return dict(zip(('output', 'query', 'key', 'value', 'locations'), (output, *grads)))


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
@pytest.mark.parametrize('shapes', [((1, 1),), ((1, 7), (5, 1)), ((3, 2),) * 5])
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
        if name != 'key' or variant == 'key apart':
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


def test_borders_and_pixel_centres():
    """Locations exactly on pixel centres, on the borders, and one step beyond them."""
    case = Case('shared key', ((4, 8),), 1, 1, 1, 8, 12 * 20, device=DEVICE)
    y, x = torch.meshgrid(torch.arange(-4, 8) / 8, torch.arange(-4, 16) / 16, indexing='ij')
    locations = torch.stack([x, y], -1).view(1, 1, 1, 1, -1, 2)
    case.inputs['locations'] = locations.to(DEVICE)
    check(case)


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
    monkeypatch.setattr(backend, '_INT32_ELEMENTS', 1)
    check(Case('key apart', PYRAMID[2:], queries=3, heads=2, dim=8, device=DEVICE))
