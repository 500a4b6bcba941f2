from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.analysis import get_model_complexity_info
from mmengine.config import ConfigDict
from small_detectors import (
    DECODERS,
    ENCODERS,
    PHRASES,
    batch,
    losses,
    small_config,
    small_model,
    without_gradient,
)

import mmlite
from mmlite.openmmlab.checkpoints import lite_change
from mmlite.openmmlab.detectors import LiteMSDeformAttnPixelDecoder
from mmlite.openmmlab.layers import KeyAwareDeformableAttention, LiteEncoder

DETECTORS = ['plain', 'refine', 'two-stage', 'DINO', 'DDQ']
LITE = dict(schedule='-(2+1)x1')
EVERY_LEVEL = dict(schedule='-(1+1)x2', key_aware=False, small_ffn=False)


@pytest.fixture
def build(request):
    """A small model of any family; Grounding DINO's gets a tiny BERT."""

    def build(name: str, encoder: dict | None = None, **changes) -> torch.nn.Module:
        bert = request.getfixturevalue('tiny_bert') if 'Grounding' in name else ''
        return small_model(name, encoder, bert, **changes)

    return build


PAIRS = [(name, padded) for name in [*DETECTORS, 'GroundingDINO'] for padded in (True, False)]


@pytest.mark.parametrize(('name', 'padded'), [*PAIRS, ('Mask2Former', True), ('panoptic', True)])
def test_stock_schedule_is_the_stock_detector(build, name, padded):
    stock, lite = build(name, std=0.05), build(name, EVERY_LEVEL)
    lite.load_state_dict(stock.state_dict())
    texts = (PHRASES, PHRASES if padded else PHRASES[2:])
    expected, actual = (losses(model, batch(model, padded, texts)) for model in (stock, lite))
    torch.testing.assert_close(dict(actual), dict(expected), atol=1e-4, rtol=1e-3)
    expected['loss'].backward()
    actual['loss'].backward()
    is_mask2former = hasattr(stock, 'panoptic_head')
    into = 'panoptic_head.pixel_decoder.level_encoding.weight' if is_mask2former else 'level_embed'
    gradients = [model.get_parameter(into).grad for model in (lite, stock)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)

    with torch.no_grad():
        if is_mask2former:  # whose masks turn over at the smallest difference
            found = []
            for model in (lite.eval(), stock.eval()):
                maps = model.backbone(batch(model)['inputs'])
                found.append(model.panoptic_head.pixel_decoder(maps))
            torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
            return
        expected = stock.eval()(**batch(stock, padded, texts), mode='predict')
        actual = lite.eval()(**batch(lite, padded, texts), mode='predict')
    for ours, theirs in zip(actual, expected):
        for field in ('scores', 'bboxes', 'labels'):
            torch.testing.assert_close(
                ours.pred_instances[field], theirs.pred_instances[field], atol=1e-3, rtol=1e-4
            )


HAVE_DECODERS = [*DETECTORS, 'GroundingDINO', 'MM-GroundingDINO']
TRAINED = [(name, key_aware) for name in HAVE_DECODERS for key_aware in (True, False)]
TRAINED += [(name, None) for name in ('Mask2Former', 'panoptic', 'Mask2Former Swin')]


@pytest.mark.parametrize(('name', 'key_aware_decoder'), TRAINED)
def test_trains(build, name, key_aware_decoder):
    has_decoder = key_aware_decoder is not None
    changes = dict(decoder=dict(key_aware=key_aware_decoder)) if has_decoder else {}
    model = build(name, LITE, **changes)
    model.init_weights()
    attentions = [m for m in model.modules() if isinstance(m, KeyAwareDeformableAttention)]
    assert len(attentions) == (4 if key_aware_decoder else 2)
    for attention in attentions:
        # MMDetection re-initialises every matrix of the encoder and restores its attention alone.
        stock = MultiScaleDeformableAttention(num_levels=attention.num_levels)
        torch.testing.assert_close(attention.sampling_offsets.bias, stock.sampling_offsets.bias)
        assert not attention.sampling_offsets.weight.any()
    assert without_gradient(model, batch(model)) == []
    with torch.no_grad():
        found = [each.pred_instances for each in model.eval()(**batch(model), mode='predict')]
    assert len(found) == 2
    if has_decoder:
        assert found[0].bboxes.isfinite().all()
        assert 'Grounding' not in name or set(found[0].label_names) <= set(PHRASES)
    else:
        assert found[0].masks.shape[1:] == (96, 128)


DETRS = ['two-stage', 'DINO', 'DDQ', 'GroundingDINO']
OPTIONS = [
    (name, {**LITE, **more}, {}) for name in [*DETRS, 'Mask2Former'] for more in ENCODERS.values()
]
OPTIONS += [
    (name, LITE, dict(decoder=dict(key_aware=True, **more)))
    for name in DETRS
    for more in DECODERS.values()
]


@pytest.mark.parametrize(('name', 'encoder', 'changes'), OPTIONS)
def test_gradients_reach_every_parameter(build, name, encoder, changes):
    model = build(name, encoder, **changes)
    assert without_gradient(model, batch(model)) == []


def test_options_reach_the_layers(build):
    encoder = dict(**LITE, update='sequential', num_cp=1, **ENCODERS['proj_key'])
    cross_attn = dict(cross_attn_cfg=dict(proj_key=True, same_loc=True))
    model = build('DINO', encoder, decoder=dict(key_aware=True, layer_cfg=cross_attn))
    assert isinstance(model.encoder, LiteEncoder)
    assert len(model.encoder.layers) == 3 and model.encoder.num_cp == 1
    assert all(layer.self_attn.proj_key for layer in model.encoder.layers)
    cross_attn = model.decoder.layers[0].cross_attn
    assert cross_attn.proj_key and cross_attn.same_loc and cross_attn.batch_first


def test_bfloat16_autocast_stays_close(build):
    model = build('DINO', LITE)
    model.init_weights()
    exact = losses(model, batch(model))['loss']
    with torch.autocast('cpu', torch.bfloat16):
        rounded = losses(model, batch(model))['loss']
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.0)
    rounded.backward()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        results = model.eval()(**batch(model), mode='predict')
    assert results[0].pred_instances.scores.isfinite().all()


def test_only_the_tokens_of_a_step_are_fused_with_the_text(build):
    model = build('GroundingDINO', LITE).eval()
    fused = []
    for layer in model.encoder.fusion_layers:
        layer.register_forward_hook(lambda module, args, output: fused.append(args[0].shape[1]))
    with torch.no_grad():
        model(**batch(model), mode='predict')
    levels = [math.ceil(128 / stride) ** 2 for stride in (8, 16, 32, 64)]
    assert fused == [sum(levels[1:]), sum(levels)]


def test_level_sizes_are_known_without_reading_the_tensor(build, monkeypatch):
    """On a GPU every read of ``spatial_shapes`` would wait for the device."""
    model = build('DINO', LITE, decoder=dict(key_aware=True)).eval()
    data = batch(model)
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda tensor: pytest.fail('a tensor is read'))
    with torch.no_grad():
        model(**data, mode='tensor')


SCHEDULES = [
    ({}, r"needs a schedule in its config: encoder=dict\(schedule='H\dL1-\(2\+1\)x3'\)"),
    (dict(schedule='-(2+1)x3'), 'makes 6 layers, but num_layers is 2'),
    (dict(schedule='H1L1-(2+1)x1'), r'is for 2 feature levels, .* use H\dL1'),
]


@pytest.mark.parametrize('name', ['DINO', 'GroundingDINO', 'Mask2Former'])
@pytest.mark.parametrize(('encoder', 'message'), SCHEDULES)
def test_schedules_that_do_not_fit(build, name, encoder, message):
    with pytest.raises(ValueError, match=message):
        build(name, encoder)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(num_feature_levels=5), 'num_feature_levels=5, but its encoder has num_levels=4'),
        (dict(positional_encoding=dict(num_feats=64)), 'has 128 channels, the encoder 256'),
        (dict(decoder=DECODERS['proj_key']), r'proj_key .* set decoder=dict\(key_aware=True\)'),
        (
            dict(test_cfg=dict(max_per_img=151)),
            'max_per_img=151 asks for more predictions than 30 queries of 5 classes give',
        ),
    ],
)
def test_configs_that_do_not_fit(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build('DINO', LITE, **changes)


def test_more_queries_than_tokens_and_more_levels_than_maps(build):
    model = build('DINO', LITE, num_queries=2000)
    with pytest.raises(ValueError, match='num_queries=2000 proposals cannot be chosen'):
        losses(model, batch(model))
    encoder = dict(schedule='H3L1-(2+1)x1', layer_cfg=dict(self_attn_cfg=dict(num_levels=4)))
    with pytest.raises(ValueError, match='encoder of 4 levels, but only 3 maps'):
        LiteMSDeformAttnPixelDecoder([8, 8, 8], encoder=encoder)
    model = build('DDQ', LITE, num_queries=2000).eval()  # which fills up what is missing
    assert len(model(**batch(model), mode='predict')[0].pred_instances)


@pytest.mark.parametrize('name', ['DINO', 'DDQ'])
def test_semi_supervised(name):
    detector, preprocessor = small_config(name).model, 'MultiBranchDataPreprocessor'
    config = ConfigDict(
        type='SemiBaseDetector',
        detector=detector,
        data_preprocessor=dict(type=preprocessor, data_preprocessor=detector.data_preprocessor),
        semi_train_cfg=dict(freeze_teacher=True, cls_pseudo_thr=0.0, unsup_weight=4.0),
        semi_test_cfg=dict(predict_on='teacher'),
    )
    config.merge(lite_change(config, 'H3L1-(2+1)x1'))
    before = copy.deepcopy(config)
    model = MODELS.build(config)
    assert config == before  # so that the runner can write it down and build it again
    model.init_weights()
    data: dict = {'inputs': {}, 'data_samples': {}}
    for branch in ('sup', 'unsup_teacher', 'unsup_student'):
        packed = demo_mm_inputs(1, [(3, 96, 128)], num_items=[3], num_classes=5)
        packed['data_samples'][0].set_metainfo(dict(homography_matrix=np.eye(3, dtype='f4')))
        for part, value in packed.items():
            data[part][branch] = value
    losses = model.train()(**model.data_preprocessor(data, training=True), mode='loss')
    assert {name.partition('_')[0] for name in losses} == {'sup', 'unsup'}
    model.parse_losses(losses)[0].backward()
    trained = dict(model.student.named_parameters())
    assert [n for n, p in trained.items() if p.requires_grad and p.grad is None] == []
    with pytest.raises(ValueError, match="take the detector inside, its 'student'"):
        mmlite.to_lite(model, 'H3L1-(2+1)x1')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['DINO', 'Mask2Former'])
def test_get_flops_counts_as_for_stock(build, name):
    """As MMDetection's get_flops.py does, which traces the model."""
    counted = []
    for encoder in (None, dict(schedule='-(1+1)x2'), LITE):
        model = build(name, encoder).eval()
        data = batch(model, padded=False)
        model.forward = partial(model.forward, data_samples=data['data_samples'])
        found = get_model_complexity_info(
            model, None, inputs=data['inputs'], show_table=False, show_arch=False
        )
        counted.append(found['flops'])
    stock, every_level, lite = counted
    assert lite < every_level
    assert stock / 2 < every_level < 2 * stock
