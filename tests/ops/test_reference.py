"""The PyTorch formulation against mmcv's and against the formulas written out point by point."""

import itertools
import math

import pytest
import torch
from operator_cases import Case
from torch import Tensor

from mmlite.ops import reference

SHAPES = ((4, 5), (2, 3), (1, 1))
SIZES = dict(shapes=SHAPES, queries=7, dim=8, dtype=torch.float64)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return Case('key apart', **SIZES).inputs


def sample_one(rows: Tensor, x: float, y: float) -> Tensor:
    """Bilinear interpolation at one location of one map (h, w, D), zero outside."""
    height, width, dim = rows.shape
    result = torch.zeros(dim, dtype=rows.dtype)
    if not (math.isfinite(x) and math.isfinite(y)):
        return result
    column, line = x * width - 0.5, y * height - 0.5
    for j in (math.floor(line), math.floor(line) + 1):
        for i in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < width and 0 <= j < height:
                result += (1 - abs(column - i)) * (1 - abs(line - j)) * rows[j, i]
    return result


def sample_all(features: Tensor, locations: Tensor) -> Tensor:
    samples = features.new_zeros(*locations.shape[:5], features.shape[3])
    starts = itertools.accumulate((h * w for h, w in SHAPES), initial=0)
    for level, ((height, width), start) in enumerate(zip(SHAPES, starts)):
        maps = features[:, start : start + height * width].unflatten(1, (height, width))
        for b, q, m, p in itertools.product(
            *map(range, (*locations.shape[:3], locations.shape[4]))
        ):
            x, y = locations[b, q, m, level, p].tolist()
            samples[b, q, m, level, p] = sample_one(maps[b, :, :, m], x, y)
    return samples.flatten(3, 4)


@pytest.mark.parametrize('wild', [None, math.nan, math.inf, -math.inf, 1e300, -1e300])
def test_samples(inputs, wild):
    """Locations that are no places in the map are outside."""
    locations = inputs['locations']
    if wild is not None:
        locations[0, :, 0, :, :, 0] = wild
        locations[1, 0, :, 1] = wild
    expected = sample_all(inputs['value'], locations)
    actual = reference.sample(inputs['value'], SHAPES, locations.requires_grad_())
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.grad(actual.sum(), locations)[0].isfinite().all()


@pytest.mark.parametrize('shared', [True, False])
def test_key_aware_attention_is_softmax_attention_over_the_samples(inputs, shared):
    query, key, value, locations = (inputs[n] for n in ('query', 'key', 'value', 'locations'))
    values = sample_all(value, locations)
    keys = values if shared else sample_all(key, locations)
    expected = torch.nn.functional.scaled_dot_product_attention(query.unsqueeze(-2), keys, values)
    key = None if shared else key
    actual = reference.key_aware_deform_attn(query, key, value, SHAPES, locations)
    torch.testing.assert_close(actual, expected.squeeze(-2).flatten(2))


def test_points_outside_stay_in_the_softmax(inputs):
    """With one point in the map and all others outside, its weight is not one."""
    locations = torch.full_like(inputs['locations'], -3.0)
    locations[:, :, :, 0, 0] = 0.5
    query, value = torch.zeros_like(inputs['query']), inputs['value']
    actual = reference.key_aware_deform_attn(query, None, value, SHAPES, locations)
    sampled = reference.sample(value, SHAPES, locations)[:, :, :, 0]
    torch.testing.assert_close(actual, sampled.flatten(2) / (3 * 4))


def test_standard_attention_is_mmcvs():
    """Outputs and gradients of mmcv's own PyTorch function."""
    mmcv_ops = pytest.importorskip('mmcv.ops.multi_scale_deform_attn', reason='needs mmcv')
    case = Case('standard', **SIZES)
    value, locations, weights = tensors = [t.requires_grad_() for t in case.inputs.values()]
    actual = reference.ms_deform_attn(value, SHAPES, locations, weights)
    expected = mmcv_ops.multi_scale_deformable_attn_pytorch(
        value, torch.tensor(SHAPES), locations, weights
    )
    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(
        torch.autograd.grad(actual, tensors, case.grad_output),
        torch.autograd.grad(expected, tensors, case.grad_output),
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(inputs, half):
    def call(dtype: torch.dtype) -> Tensor:
        tensors = {name: tensor.to(half).to(dtype) for name, tensor in inputs.items()}
        query, key, value, locations = (tensors[n] for n in ('query', 'key', 'value', 'locations'))
        return reference.key_aware_deform_attn(query, key, value, SHAPES, locations)

    assert torch.equal(call(half), call(torch.float32).to(half))


def test_locations_by_hand():
    """One point a map: offsets count in pixels around a point, in halves of its size in a box."""
    offsets = torch.tensor([[1.0, -2.0], [3.0, 0.5]]).view(1, 1, 1, 2, 1, 2)
    sizes = [(4, 10), (2, 5)]
    point = torch.tensor([0.5, 0.25]).expand(1, 1, 2, 2)
    found = reference.sampling_locations(point, offsets, sizes).view(2, 2)
    expected = [[0.5 + 1 / 10, 0.25 - 2 / 4], [0.5 + 3 / 5, 0.25 + 0.5 / 2]]
    torch.testing.assert_close(found, torch.tensor(expected))
    box = torch.tensor([0.5, 0.25, 0.2, 0.4]).expand(1, 1, 2, 4)
    found = reference.sampling_locations(box, offsets, sizes).view(2, 2)
    expected = [[0.5 + 0.1, 0.25 - 2 * 0.2], [0.5 + 3 * 0.1, 0.25 + 0.5 * 0.2]]
    torch.testing.assert_close(found, torch.tensor(expected))
