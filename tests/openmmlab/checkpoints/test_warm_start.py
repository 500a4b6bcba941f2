import copy
import math
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from small_detectors import batch, small_config
from torch import nn

from mmlite.nn import DeformableAttention, KeyAwareDeformableAttention
from mmlite.nn import encoder as nn_encoder
from mmlite.nn.schedule import EncoderStep
from mmlite.nn.tokens import StepTokens
from mmlite.openmmlab.build import build_initialised
from mmlite.openmmlab.checkpoints import stock_config, warm_start
from mmlite.openmmlab.checkpoints.hooks import WarmStartHook
from mmlite.openmmlab.checkpoints.warm_start import (
    _fit_attention,
    _fit_small_ffn,
    _least_squares,
)
from mmlite.openmmlab.detectors.grounding_dino import adapt_bert
from mmlite.openmmlab.lite_config import lite_change, main_schedule

FFN = dict(layer_cfg=dict(ffn_cfg=dict(feedforward_channels=512)))
WIDE = dict(
    data_preprocessor=dict(mean=[0, 0, 0]),
    backbone=dict(base_channels=16),
    neck=dict(in_channels=[32, 64, 128]),
    encoder=FFN,
    decoder=dict(num_layers=1, **FFN),
)


def lite_config(**changes) -> ConfigDict:
    model = small_config('DINO').model
    model.merge(lite_change(model, 'H3L1-(2+1)x1'))
    model.merge(copy.deepcopy(WIDE))
    model.merge(copy.deepcopy(changes))
    return model


@pytest.fixture(scope='module')
def stock():
    """State dict of the stock detector, its attention doing something of its own."""
    torch.manual_seed(0)
    model = build_initialised(stock_config(lite_config()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'attention_weights' in name or 'sampling_offsets' in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.state_dict()


def start(stock, **changes):
    config = lite_config(**changes)
    torch.manual_seed(1)
    model = build_initialised(config)
    packed = demo_mm_inputs(2, [(3, 96, 128), (3, 128, 96)], num_items=[2, 1], num_classes=5)
    return model, warm_start(model, config, stock, model.data_preprocessor(packed))


def test_where_everything_has_a_counterpart_nothing_differs(stock):
    _, report = start(
        stock, encoder=dict(schedule='H3L1-(1+1)x2', key_aware=False, small_ffn=False)
    )
    assert not report.fitted and not report.unused
    assert report.result.memory < 1e-5
    assert report.result.found == 1 and report.result.score < 1e-5
    assert report.copied_only == report.result


@pytest.mark.parametrize(
    'changes',
    [
        dict(),
        dict(encoder=dict(key_aware=False)),
        dict(encoder=dict(small_ffn=False)),
        dict(encoder=dict(update='sequential')),
        dict(
            encoder=dict(layer_cfg=dict(self_attn_cfg=dict(proj_key=True, same_loc=True))),
            decoder=dict(key_aware=True),
        ),
        dict(bbox_head=dict(num_classes=7), num_queries=20),
    ],
    ids=['joint', 'standard attention', 'no small FFN', 'sequential', 'everything', 'other data'],
)
def test_new_parts_come_close(stock, changes):
    model, report = start(stock, **changes)
    # A fresh attention weighs all points alike, which is no bad start.
    assert report.result.memory < 0.98 * report.copied_only.memory
    state, layers = model.state_dict(), model.encoder.stock_layers
    for name in report.copied:
        source = name.split('.')
        if name.startswith('encoder.layers.'):
            source[2] = str(layers[int(source[2])])
        assert torch.equal(state[name], stock['.'.join(source)]), name
    accounted = {'encoder.schedule_code', *report.copied, *report.fitted, *report.fresh}
    assert accounted == set(state)
    new = ('query_proj', 'key_proj', 'small_')
    same_loc = 'same_loc' in str(changes)
    for name in report.fitted:
        assert any(part in name for part in new) or (same_loc and 'sampling_offsets' in name)
    if same_loc:  # the mean of the stock offsets of 8 heads, 4 levels and 4 points over the levels
        name = 'encoder.layers.0.self_attn.sampling_offsets.bias'
        torch.testing.assert_close(state[name], stock[name].view(8, 4, 8).mean(1).flatten())
    if 'bbox_head' in changes:  # as published weights of 80 classes start a detector of one's own
        of_rows = ('query_embedding', 'label_embedding', 'cls_branches')
        assert len(report.fresh) == 2 + 2 * len(model.bbox_head.cls_branches)
        assert all(any(part in name for part in of_rows) for name in report.fresh)
        assert report.result.found is None
        assert 'another number of classes or queries' in str(report)
    else:
        assert not report.fresh and report.result.found >= report.copied_only.found


def test_a_small_ffn_that_holds_all_units_is_the_stock_ffn(stock):
    ffn = dict(ffn_cfg=dict(feedforward_channels=64))
    encoder = dict(schedule='H3L1-(1+1)x2', key_aware=False, layer_cfg=ffn)
    small = dict(stock)
    for name, value in stock.items():
        if 'encoder' in name and 'ffn.layers.0' in name:
            small[name] = value[:64]
        elif 'encoder' in name and 'ffn.layers.1.weight' in name:
            small[name] = value[:, :64]
    _, report = start(small, encoder=encoder)
    assert report.result.memory < 1e-4 < report.copied_only.memory


SEGMENTER = dict(
    panoptic_head=dict(num_things_classes=5, num_queries=15),
    panoptic_fusion_head=dict(num_things_classes=5),
)
BOXES = dict(bbox_head=dict(num_classes=1), num_queries=20, test_cfg=dict(max_per_img=20))
# What differs in the detector that the weights are of; those of H-Deformable-DETR start 30 + 20.
OTHERS = {
    'H-DETR, more': ('two-stage', dict(num_queries=40, num_one2many_queries=30)),
    'H-DETR, fewer': ('two-stage', dict(BOXES, num_one2many_queries=0)),
    'H-DETR, one-to-one': ('two-stage', dict(num_one2many_queries=0)),
    'two-stage': ('two-stage', {}),
    'H-DETR': ('two-stage', {}),
    'DDQ': ('DDQ', BOXES),
    'plain': ('plain', BOXES),
    'GroundingDINO': ('GroundingDINO', BOXES),
    'MM-GroundingDINO': ('MM-GroundingDINO', BOXES),
    'Mask2Former': ('Mask2Former', SEGMENTER),
    'panoptic': ('panoptic', SEGMENTER),
}


def small_ffn_alone(hidden_bias, padding_mask=None):
    """Fit a small FFN of two units to a stock FFN of three; returns it and the stock FFN.

    There is one low-level map of four tokens. The last output is wrong where it is padding.
    """
    step = EncoderStep(False, True)
    dims, tokens = 2, torch.tensor([[[1.0, 2.0], [2.0, -1.0], [-1.0, 3.0], [4.0, -5.0]]])
    stock = SimpleNamespace(ffn=nn_encoder.FFN(dims, 3), norms=[None, nn.LayerNorm(dims)])
    first, last = stock.ffn.layers[0][0], stock.ffn.layers[1]
    first.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    first.bias.data = torch.tensor(hidden_bias)
    # The last unit says nothing to the output, however large it is.
    last.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    last.bias.data.zero_()
    attention = KeyAwareDeformableAttention(dims, 1, 1, 1)
    layer = nn_encoder.LiteEncoderLayer(
        step, attention, nn.LayerNorm(dims), lambda _: (nn_encoder.FFN(dims, 2), nn.LayerNorm(dims))
    )
    target = stock.ffn(tokens).detach()
    if padding_mask is not None:
        target[padding_mask] += 1000
    kept = {
        layer: (tokens, None, StepTokens(step, [(2, 2)], [0], 0), padding_mask),
        stock.norms[1]: (target,),
    }
    with torch.no_grad():
        _fit_small_ffn(layer, stock, kept, layer.norms[0], (), tokens)
        return layer.small_ffn, stock.ffn, tokens


def test_a_small_ffn_takes_the_units_that_the_output_hears():
    small, stock, tokens = small_ffn_alone([50.0, 60.0, 1000.0])
    torch.testing.assert_close(small(tokens), stock(tokens), rtol=1e-4, atol=1e-3)
    assert sorted(small.layers[0][0].bias.tolist()) == [50.0, 60.0]


def test_a_small_ffn_is_not_fitted_to_padding():
    mask = torch.tensor([[False, False, False, True]])
    small, stock, tokens = small_ffn_alone([50.0, 60.0, 70.0], mask)
    inner = tokens[:, :3]
    torch.testing.assert_close(small(inner), stock(inner), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('case', OTHERS)
def test_other_classes_and_queries_of_every_family(case, request):
    name, teacher = OTHERS[case]
    bert = request.getfixturevalue('tiny_bert') if 'Grounding' in name else ''
    config = small_config(name, bert)
    if case.startswith('H-DETR'):
        heads = dict(type='HDeformableDETRHead')
        config.model.merge(dict(type='HDeformableDETR', num_one2many_queries=20, bbox_head=heads))
    config.model.merge(lite_change(config.model, main_schedule(config.model)))
    other = stock_config(config.model)
    other.merge(copy.deepcopy(teacher))
    torch.manual_seed(0)
    stock = MODELS.build(other)
    model = MODELS.build(copy.deepcopy(config.model))
    if hasattr(stock, 'level_embed'):
        torch.nn.init.normal_(stock.level_embed)  # MMDetection leaves it as the memory was
    if bert:
        adapt_bert(stock.language_model)
    start = warm_start(model, config.model, stock.state_dict(), batch(model))
    of_rows = ('query_', 'label_embedding', 'cls_', 'reference_points_fc')
    assert all(any(part in name for part in of_rows) for name in start.fresh)
    assert bool(start.fresh) == bool(teacher)
    assert start.result.memory < 0.98 * start.copied_only.memory


def test_least_squares():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 4, generator=generator)
    wanted = features @ torch.arange(8.0).view(4, 2) + torch.tensor([1.0, -2.0])
    weight, bias = _least_squares(features, wanted, torch.zeros(4, 2))
    torch.testing.assert_close(weight, torch.arange(8.0).view(4, 2), atol=1e-2, rtol=0)
    torch.testing.assert_close(bias, torch.tensor([1.0, -2.0]), atol=1e-2, rtol=0)

    # By hand: the features are -1 and 1 around their mean, their squares make 2, and a ridge of
    # 0.2 * 1 feature / 2 tokens makes that 2.2; the prior of 1 lacks 2 of the slope of 3.
    features, wanted = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [6.0]])
    weight, bias = _least_squares(features, wanted, torch.ones(1, 1))
    torch.testing.assert_close(weight, torch.tensor([[1 + 2 * 2 / 2.2]]))
    torch.testing.assert_close(bias, 3 - weight[0])


def test_query_projection_by_hand():
    """One query of 1 and two points of weights 3/4 and 1/4, whose keys are 1 and -1.

    Weight and bias are x, the same: the logits differ by 4 x. The variance of their error under
    these weights is 3/16 (4 x - log 3) ** 2; half of it and of the ridge of 0.01 * (1 + 1) for
    x ** 2 + x ** 2 is least at this x.
    """
    stock, attention = DeformableAttention(1, 1, 1, 2), KeyAwareDeformableAttention(1, 1, 1, 2)
    with torch.no_grad():
        stock.attention_weights.bias.copy_(torch.tensor([math.log(3), 0]))
        attention.sampling_offsets.bias.copy_(torch.tensor([0.0, 0, 1, 0]))
        attention.value_proj.weight.fill_(1)
        value, centre = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[[[0.25, 0.5]]]])
        call = dict(value=value, reference_points=centre, spatial_shapes=((1, 2),))
        _fit_attention(stock, attention, (torch.ones(1, 1, 1),), call)
    x = torch.tensor(3 / 16 * 4 * math.log(3) / (3 / 16 * 16 + 2 * 0.02))
    torch.testing.assert_close(attention.query_proj.weight[0, 0], x)
    torch.testing.assert_close(attention.query_proj.bias[0], x)


def test_refuses_other_weights(stock):
    with pytest.raises(ValueError, match=r'weights are not those of the DINO behind this config.*'):
        start({name: value for name, value in stock.items() if 'decoder' not in name})
    with pytest.raises(ValueError, match=r'level_embed .*another shape'):
        start({**stock, 'level_embed': torch.zeros(5, 256)})


def test_hook(stock, tmp_path):
    torch.save(dict(state_dict=stock), tmp_path / 'stock.pth')
    hook = WarmStartHook(str(tmp_path / 'stock.pth'))
    config = Config(dict(model=lite_config()))
    loader = [demo_mm_inputs(2, [(3, 96, 128)] * 2, num_items=[2, 1], num_classes=5)]
    runner = SimpleNamespace(
        iter=1,
        model=build_initialised(config.model),
        cfg=config,
        train_dataloader=loader,
        logger=MMLogger.get_instance('warm start'),
    )
    weight = runner.model.query_embedding.weight
    before = weight.clone()
    hook.before_train(runner)  # a training resumed after a single iteration
    assert torch.equal(weight, before)
    runner.iter = 0
    hook.before_train(runner)
    assert torch.equal(weight, stock['query_embedding.weight'])
    with pytest.raises(FileNotFoundError, match='does not exist'):
        WarmStartHook(str(tmp_path / 'none.pth'))
