"""Stock MMDetection models on the fused kernels."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention, multi_scale_deform_attn
from mmdet.registry import HOOKS
from packaging.version import Version
from small_detectors import batch, small_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmlite import layers, ops

LAYERS = 2


@pytest.fixture
def stock():
    """MMDetection's own Deformable DETR with few and thin layers."""
    model = small_model('plain')
    model.init_weights()
    return model.eval()


def outputs(model: nn.Module) -> list[torch.Tensor]:
    return [*model.forward(**batch(model), mode='tensor')[:2]]


def forbid_mmcv(monkeypatch):
    def refuse(*args):
        raise AssertionError("mmcv's own CPU path was taken")

    monkeypatch.setattr(multi_scale_deform_attn, 'multi_scale_deformable_attn_pytorch', refuse)


def test_a_stock_detector_computes_the_same(stock, monkeypatch):
    expected = outputs(stock)
    names = list(stock.state_dict())
    assert layers.fuse_attention(stock) == 2 * LAYERS
    assert layers.fuse_attention(stock) == 0
    assert list(stock.state_dict()) == names
    forbid_mmcv(monkeypatch)
    for model in (stock, copy.deepcopy(stock)):
        for actual, wanted in zip(outputs(model), expected):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same():
    attention = MultiScaleDeformableAttention(32, 4, 2, 4, dropout=0.0, batch_first=True)
    nn.init.normal_(attention.sampling_offsets.weight, std=0.1)
    fused = copy.deepcopy(attention)
    layers.fuse_attention(fused)
    shapes = torch.tensor([[5, 7], [3, 2]])
    query = torch.randn(2, 9, 32)
    memory = torch.randn(2, 41, 32)
    reference_points = torch.rand(2, 9, 2, 2)
    grads = []
    for module in (attention, fused):
        output = module(
            query, value=memory, reference_points=reference_points, spatial_shapes=shapes
        )
        grads.append(torch.autograd.grad(output.square().sum(), list(module.parameters())))
    for actual, wanted in zip(grads[1], grads[0]):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_subclasses_keep_what_they_do():
    class Other(MultiScaleDeformableAttention):
        pass

    model = nn.ModuleList([Other(32, 4, 2), layers.KeyAwareDeformableAttention(32, 4, 2)])
    assert layers.fuse_attention(model) == 0


@pytest.mark.skipif(
    Version(torch.__version__) < Version('2.4'),
    reason='fake tensors of torch before 2.4 ask the device',
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_takes_our_operator(monkeypatch, dtype):
    """On tensors that pretend: no device is needed up to the operator."""
    attention = MultiScaleDeformableAttention(32, 4, 2, batch_first=True)
    layers.fuse_attention(attention)
    taken = []

    def operator(value, spatial_shapes, reference_points, offsets, weights):
        taken.append((value.device.type, value.dtype, spatial_shapes))
        return value.new_empty(*offsets.shape[:2], 32)

    monkeypatch.setattr(ops, 'ms_deform_attn_from_offsets', operator)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(*shape: int, dtype: torch.dtype = dtype) -> FakeTensor:
        return FakeTensor(mode, torch.empty(shape, device='meta', dtype=dtype), 'cuda:0')

    # Outside the mode, in which older versions of PyTorch make no fake tensor from a meta tensor.
    for module in attention.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = fake(*parameter.shape)
    query, memory = fake(2, 9, 32), fake(2, 41, 32)
    reference_points = fake(2, 9, 2, 2, dtype=torch.float32)
    with torch.no_grad(), mode:
        attention(
            query,
            value=memory,
            reference_points=reference_points,
            spatial_shapes=((5, 7), (3, 2)),
        )
    assert taken == [('cuda', dtype, ((5, 7), (3, 2)))]


def test_other_devices_keep_mmcvs_kernel(monkeypatch):
    attention = MultiScaleDeformableAttention(32, 4, 2)
    layers.fuse_attention(attention)
    taken = []
    monkeypatch.setattr(
        MultiScaleDeformableAttention, 'forward', lambda self, query, **kwargs: taken.append(self)
    )
    attention(torch.empty(9, 2, 32, device='meta'))
    assert taken == [attention]


def test_hook_of_a_config():
    hook = HOOKS.build(dict(type='FusedAttentionHook'))
    model = nn.ModuleList([MultiScaleDeformableAttention(32, 4, 2)])
    runner = SimpleNamespace(model=model, logger=logging.getLogger('test'))
    hook.before_run(runner)
    assert type(model[0]) is not MultiScaleDeformableAttention
