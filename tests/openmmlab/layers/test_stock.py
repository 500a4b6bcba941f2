"""Stock MMDetection models on the fused kernels."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention, multi_scale_deform_attn
from mmdet.registry import HOOKS
from small_detectors import batch, losses, small_model
from torch import nn

from mmlite import layers


def test_a_stock_detector_computes_the_same(monkeypatch):
    """MMDetection's own Deformable DETR: losses, gradients and what a copy predicts."""

    def compute(model):
        loss = losses(model, data)['loss']
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            output = copy.deepcopy(model).eval()(**data, mode='tensor')
        return loss, gradients, output[:2]

    def refuse(*args):
        raise AssertionError("mmcv's own CPU path was taken")

    stock = small_model('plain', std=0.05)
    data, fused, names = batch(stock), copy.deepcopy(stock), list(stock.state_dict())
    assert layers.fuse_attention(fused) == 2 + 2  # layers of the encoder, and of the decoder
    assert layers.fuse_attention(fused) == 0
    assert list(fused.state_dict()) == names
    expected = compute(stock)
    monkeypatch.setattr(multi_scale_deform_attn, 'multi_scale_deformable_attn_pytorch', refuse)
    torch.testing.assert_close(compute(fused), expected, rtol=1e-3, atol=1e-4)


def test_subclasses_keep_what_they_do():
    other = type('Other', (MultiScaleDeformableAttention,), {})
    model = nn.ModuleList([other(32, 4, 2), layers.KeyAwareDeformableAttention(32, 4, 2)])
    assert layers.fuse_attention(model) == 0


@pytest.mark.parametrize(('device', 'has_ours'), [('cpu', True), ('cuda', True), ('xpu', False)])
def test_other_devices_keep_mmcvs_kernel(monkeypatch, device, has_ours):
    attention = MultiScaleDeformableAttention(32, 4, 2)
    runner = SimpleNamespace(model=attention, logger=logging.getLogger('test'))
    HOOKS.build(dict(type='FusedAttentionHook')).before_run(runner)
    taken = []
    for cls in (layers.FusedDeformableAttention, MultiScaleDeformableAttention):
        monkeypatch.setattr(cls, 'forward', lambda self, query, cls=cls: taken.append(cls))
    attention(SimpleNamespace(**{'is_cpu': False, 'is_cuda': False, f'is_{device}': True}))
    assert (taken == [layers.FusedDeformableAttention]) == has_ours and len(taken) == 1
