import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention, multi_scale_deform_attn
from mmdet.registry import HOOKS, MODELS
from small_detectors import batch, losses, small_model
from torch import nn

from mmlite.layers import (
    FusedDeformableAttention,
    KeyAwareDeformableAttention,
    LiteEncoder,
    fuse_attention,
)

SHAPES = torch.tensor([(7, 9), (4, 5), (2, 3)])
TOKENS = int(SHAPES.prod(1).sum())
THIN = dict(embed_dims=32, num_heads=4, num_levels=3)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize('name', ['kda_ref2', 'kda_ref2_sameloc', 'kda_ref4_projkey'])
def test_golden(golden, name):
    arrays, meta = golden(f'{name}.npz')
    options = ('embed_dims', 'num_heads', 'num_levels', 'num_points', 'proj_key', 'same_loc')
    options = {name: meta[name] for name in options}
    attention = KeyAwareDeformableAttention(**options, dropout=0.0)  # the batch comes second
    parameters = {k[len('param.') :]: v for k, v in arrays.items() if k.startswith('param.')}
    attention.load_state_dict(parameters)
    query = arrays['query'].requires_grad_()
    value = arrays['value'].requires_grad_()
    output = attention(
        query.transpose(0, 1),
        value=value.transpose(0, 1),
        identity=torch.zeros_like(query).transpose(0, 1),
        key_padding_mask=arrays['key_padding_mask'],
        reference_points=arrays['reference_points'],
        spatial_shapes=arrays['spatial_shapes'],
    ).transpose(0, 1)
    torch.testing.assert_close(output, arrays['output'], atol=1e-5, rtol=0)
    output.backward(arrays['grad_output'])
    assert relative_error(query.grad, arrays['grad_query']) < 1e-4
    assert relative_error(value.grad, arrays['grad_value']) < 1e-4
    for parameter_name, parameter in attention.named_parameters():
        assert relative_error(parameter.grad, arrays[f'grad.{parameter_name}']) < 1e-4


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('reference_dim', [2, 4])
@pytest.mark.parametrize('padded', [True, False])
def test_standard_attention_equals_mmcv(batch_first, reference_dim, padded):
    torch.manual_seed(0)
    arguments = dict(THIN, num_points=2, dropout=0.0, batch_first=batch_first)
    stock = MultiScaleDeformableAttention(**arguments)
    torch.nn.init.normal_(stock.sampling_offsets.weight, std=0.3)
    torch.nn.init.normal_(stock.attention_weights.weight, std=0.3)
    fused = FusedDeformableAttention(**arguments)
    fused.load_state_dict(stock.state_dict())

    def run(attention):
        torch.manual_seed(1)
        query, query_pos = torch.randn(2, 2, 11, 32).unbind()
        value = torch.randn(2, TOKENS, 32)
        query.requires_grad_(), value.requires_grad_()
        turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
        output = attention(
            turn(query),
            value=turn(value),
            query_pos=turn(query_pos),
            key_padding_mask=torch.rand(2, TOKENS) < 0.2 if padded else None,
            reference_points=torch.rand(2, 11, 3, reference_dim),
            spatial_shapes=SHAPES,
            level_start_index=None,
        )
        torch.manual_seed(2)
        gradients = torch.autograd.grad(
            turn(output), [query, value, *attention.parameters()], torch.randn(2, 11, 32)
        )
        return [output, *gradients]

    for actual, expected in zip(run(fused), run(stock)):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_initial_offsets_are_the_directional_grid():
    stock = MultiScaleDeformableAttention(**THIN)
    attention = KeyAwareDeformableAttention(**THIN)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    attention.init_weights()
    torch.testing.assert_close(attention.sampling_offsets.bias, stock.sampling_offsets.bias)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.query_proj.bias.any()
    assert attention.query_proj.weight.any()

    assert set(dict(attention.named_children())) == {
        *('sampling_offsets', 'value_proj', 'query_proj', 'output_proj', 'dropout')
    }
    shared = KeyAwareDeformableAttention(**THIN, same_loc=True)
    grid = stock.sampling_offsets.bias.view(4, 3, 4, 2)[:, 0]
    torch.testing.assert_close(shared.sampling_offsets.bias.view(4, 4, 2), grid)


@pytest.mark.parametrize('proj_key', [False, True])
def test_fresh_points_weigh_nearly_the_same(proj_key):
    attention = KeyAwareDeformableAttention(num_levels=3, batch_first=True, proj_key=proj_key)
    torch.nn.init.normal_(attention.query_proj.weight)
    attention.init_weights()
    tokens = torch.randn(1, TOKENS, 256)
    logits = attention.logits(tokens, tokens, None, torch.rand(1, TOKENS, 3, 2), SHAPES)
    weights = logits.softmax(-1) * logits.shape[-1]
    assert 0.01 < weights.std() < 0.2  # those of standard attention start at 1, alike


def test_unfitting_levels():
    attention, query = KeyAwareDeformableAttention(**THIN, batch_first=True), torch.randn(1, 9, 32)
    for levels, shapes, name in ((2, SHAPES, 'reference_poi'), (3, SHAPES[:2], 'spatial_shapes')):
        points = torch.rand(1, 9, levels, 2)
        with pytest.raises(ValueError, match=f'{name}.* is for 2 feature levels'):
            attention(query, reference_points=points, spatial_shapes=shapes)


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
    assert fuse_attention(fused) == 2 + 2  # layers of the encoder, and of the decoder
    assert fuse_attention(fused) == 0
    subclass = type('Other', (MultiScaleDeformableAttention,), {})
    assert fuse_attention(nn.ModuleList([subclass(), KeyAwareDeformableAttention()])) == 0
    assert list(fused.state_dict()) == names
    expected = compute(stock)
    monkeypatch.setattr(multi_scale_deform_attn, 'multi_scale_deformable_attn_pytorch', refuse)
    torch.testing.assert_close(compute(fused), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('device', 'has_ours'), [('cpu', True), ('cuda', True), ('xpu', False)])
def test_other_devices_keep_mmcvs_kernel(monkeypatch, device, has_ours):
    attention = MultiScaleDeformableAttention(32, 4, 2)
    runner = SimpleNamespace(model=attention, logger=logging.getLogger('test'))
    HOOKS.build(dict(type='FusedAttentionHook')).before_run(runner)
    taken = []
    for cls in (FusedDeformableAttention, MultiScaleDeformableAttention):
        monkeypatch.setattr(cls, 'forward', lambda self, query, cls=cls: taken.append(cls))
    attention(SimpleNamespace(**{'is_cpu': False, 'is_cuda': False, f'is_{device}': True}))
    assert (taken == [FusedDeformableAttention]) == has_ours and len(taken) == 1


@pytest.mark.parametrize('num_layers', [6, 9])  # of the stock encoder, or its own
def test_sequential_keeps_the_stock_number_of_layers_in_the_config(num_layers):
    config = dict(type='LiteEncoder', schedule='H3L1-(2+1)x3', layer_cfg=dict(self_attn_cfg={}))
    encoder = MODELS.build(dict(config, update='sequential', num_layers=num_layers))
    assert isinstance(encoder, LiteEncoder)
    assert encoder.num_layers == len(encoder.layers) == 9
