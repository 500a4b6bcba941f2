"""The PyTorch formulation against mmcv's and against the formulas written out point by point."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmlite.ops import reference

SHAPES = ((4, 5), (2, 3), (1, 1))
B, Q, M, D, P = 2, 7, 3, 8, 4
S, L = sum(h * w for h, w in SHAPES), len(SHAPES)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    locations = torch.rand(B, Q, M, L, P, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    return dict(
        query=normal(B, Q, M, D),
        key=normal(B, S, M, D),
        value=normal(B, S, M, D),
        locations=locations,
        weights=torch.rand(B, Q, M, L, P, generator=generator, dtype=torch.float64),
    )


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
    samples = torch.zeros(B, Q, M, L * P, D, dtype=features.dtype)
    for b in range(B):
        for m in range(M):
            maps = features[b, :, m].split([h * w for h, w in SHAPES])
            for q in range(Q):
                for i in range(L * P):
                    level, point = divmod(i, P)
                    rows = maps[level].unflatten(0, SHAPES[level])
                    x, y = locations[b, q, m, level, point].tolist()
                    samples[b, q, m, i] = sample_one(rows, x, y)
    return samples


@pytest.fixture
def spatial_shapes() -> tuple[tuple[int, int], ...]:
    return SHAPES


def test_samples(inputs, spatial_shapes):
    actual = reference.sample(inputs['value'], spatial_shapes, inputs['locations'])
    torch.testing.assert_close(actual, sample_all(inputs['value'], inputs['locations']))


@pytest.mark.parametrize('wild', [math.nan, math.inf, -math.inf, 1e300, -1e300])
def test_wild_locations_are_outside(inputs, spatial_shapes, wild):
    locations = inputs['locations'].clone()
    locations[0, :, 0, :, :, 0] = wild
    locations[1, 0, :, 1] = wild
    locations.requires_grad_()
    actual = reference.sample(inputs['value'], spatial_shapes, locations)
    torch.testing.assert_close(actual, sample_all(inputs['value'], locations.detach()))
    assert torch.autograd.grad(actual.sum(), locations)[0].isfinite().all()


@pytest.mark.parametrize('shared', [True, False])
def test_key_aware_attention_is_softmax_attention_over_the_samples(inputs, spatial_shapes, shared):
    values = sample_all(inputs['value'], inputs['locations'])
    keys = values if shared else sample_all(inputs['key'], inputs['locations'])
    expected = torch.nn.functional.scaled_dot_product_attention(
        inputs['query'].unsqueeze(-2), keys, values
    )
    actual = reference.key_aware_deform_attn(
        inputs['query'],
        None if shared else inputs['key'],
        inputs['value'],
        spatial_shapes,
        inputs['locations'],
    )
    torch.testing.assert_close(actual, expected.squeeze(-2).flatten(2))


def test_points_outside_stay_in_the_softmax(inputs, spatial_shapes):
    """With one point in the map and all others outside, its weight is not one."""
    locations = torch.full_like(inputs['locations'], -3.0)
    locations[:, :, :, 0, 0] = 0.5
    zero_query = torch.zeros_like(inputs['query'])
    actual = reference.key_aware_deform_attn(
        zero_query, None, inputs['value'], spatial_shapes, locations
    )
    sampled = reference.sample(inputs['value'], spatial_shapes, locations)[:, :, :, 0]
    torch.testing.assert_close(actual, sampled.flatten(2) / (L * P))


def test_standard_attention_is_mmcvs(inputs, spatial_shapes):
    """Outputs and gradients of mmcv's own PyTorch function."""
    mmcv_ops = pytest.importorskip('mmcv.ops.multi_scale_deform_attn', reason='needs mmcv')
    tensors = [inputs[name].clone().requires_grad_() for name in ('value', 'locations', 'weights')]
    value, locations, weights = tensors
    actual = reference.ms_deform_attn(value, spatial_shapes, locations, weights)
    expected = mmcv_ops.multi_scale_deformable_attn_pytorch(
        value, torch.tensor(spatial_shapes), locations, weights
    )
    torch.testing.assert_close(actual, expected)
    grad_output = torch.randn_like(actual)
    for mine, theirs in zip(
        torch.autograd.grad(actual, tensors, grad_output),
        torch.autograd.grad(expected, tensors, grad_output),
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(inputs, spatial_shapes, dtype):
    rounded = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    wide = {name: tensor.float() for name, tensor in rounded.items()}

    def call(tensors):
        return reference.key_aware_deform_attn(
            tensors['query'], tensors['key'], tensors['value'], spatial_shapes, tensors['locations']
        )

    assert torch.equal(call(rounded), call(wide).to(dtype))


def test_gradcheck(spatial_shapes):
    shapes = [(2, 3), (1, 2)]
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(1, 2, 1, 3, generator=generator, dtype=torch.float64),
        torch.randn(1, 8, 1, 3, generator=generator, dtype=torch.float64),
        torch.randn(1, 8, 1, 3, generator=generator, dtype=torch.float64),
        torch.rand(1, 2, 1, 2, 2, 2, generator=generator, dtype=torch.float64),
    ]
    assert torch.autograd.gradcheck(
        lambda q, k, v, loc: reference.key_aware_deform_attn(q, k, v, shapes, loc),
        [tensor.requires_grad_() for tensor in tensors],
    )
