"""Every family: equal to stock where it should be, and every parameter learns."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmengine.analysis import get_model_complexity_info
from small_detectors import (
    DECODERS,
    ENCODERS,
    PHRASES,
    STOCK,
    batch,
    losses,
    small_model,
    without_gradient,
)

from mmlite.openmmlab.detectors import LiteMSDeformAttnPixelDecoder
from mmlite.openmmlab.families import encoder_name
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


def encoder_of(model: torch.nn.Module) -> LiteEncoder:
    return model.get_submodule(encoder_name(model))


CONFIGS = {
    **{STOCK[name]: 'H3L1-(2+1)x3' for name in DETECTORS},
    'dino/dino-4scale_r50_8xb2-24e_coco.py': 'H3L1-(2+1)x3',
    'dino/dino-4scale_r50_8xb2-36e_coco.py': 'H3L1-(2+1)x3',
    'dino/dino-4scale_r50_improved_8xb2-12e_coco.py': 'H3L1-(2+1)x3',
    'dino/dino-5scale_swin-l_8xb2-12e_coco.py': 'H4L1-(2+1)x3',
    'dino/dino-5scale_swin-l_8xb2-36e_coco.py': 'H3L2-(2+1)x3',
}


@pytest.mark.parametrize('base', CONFIGS)
def test_three_lines_turn_every_stock_config_into_lite(user_config, base):
    family = base.partition('/')[0]
    lite = {'deformable_detr': 'LiteDeformableDETR', 'dino': 'LiteDINO', 'ddq': 'LiteDDQDETR'}
    change = dict(type=lite[family], encoder=dict(schedule=CONFIGS[base]))
    config = user_config(f'mmdet::{base}', model=change)
    if config.model.backbone.type == 'SwinTransformer':
        config.model.backbone.depths = [1, 1, 1, 1]  # a Swin-L takes seconds to build
    model = MODELS.build(config.model)
    assert type(model).__name__ == lite[family]
    assert str(model.encoder.schedule) == CONFIGS[base]
    assert len(model.encoder.layers) == 6
    assert all(isinstance(x.self_attn, KeyAwareDeformableAttention) for x in model.encoder.layers)
    assert model.encoder.embed_dims == model.embed_dims == 256


def test_video_segmentation(user_config):
    stock = 'mmdet::mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019.py'
    pixel_decoder = dict(type='LiteMSDeformAttnPixelDecoder', encoder=dict(schedule='H2L1-(2+1)x3'))
    config = user_config(stock, model=dict(track_head=dict(pixel_decoder=pixel_decoder)))
    config.model.backbone.init_cfg = None
    head = MODELS.build(config.model).track_head
    assert isinstance(head.pixel_decoder, LiteMSDeformAttnPixelDecoder)
    assert str(head.pixel_decoder.encoder.schedule) == 'H2L1-(2+1)x3'


# --- Equal to stock ----------------------------------------------------------------------------

PAIRS = [(name, padded) for name in DETECTORS for padded in (True, False)]
PAIRS += [('GroundingDINO', True), ('GroundingDINO', False), ('Mask2Former', True)]


@pytest.mark.parametrize(('name', 'padded'), [*PAIRS, ('panoptic', True)])
def test_stock_schedule_is_the_stock_detector(build, name, padded):
    stock, lite = build(name, std=0.05), build(name, EVERY_LEVEL)
    lite.load_state_dict(stock.state_dict())
    texts = (PHRASES, PHRASES if padded else PHRASES[2:])
    expected, actual = (losses(model, batch(model, padded, texts)) for model in (stock, lite))
    assert actual.keys() == expected.keys()
    for loss in expected:
        torch.testing.assert_close(actual[loss], expected[loss], atol=1e-4, rtol=1e-3)
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


def test_stock_equivalence_sees_a_difference(build):
    """The comparison above fails where the models do differ."""
    stock, lite = build('DINO', std=0.05), build('DINO', {**EVERY_LEVEL, **LITE})
    lite.load_state_dict(stock.state_dict())
    with torch.no_grad():
        expected = stock.eval()(**batch(stock), mode='tensor')[0]
        actual = lite.eval()(**batch(lite), mode='tensor')[0]
    assert not torch.allclose(actual, expected, atol=1e-3)


# --- Training ----------------------------------------------------------------------------------

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
        results = model.eval()(**batch(model), mode='predict')
    assert len(results) == 2
    if has_decoder:
        assert results[0].pred_instances.bboxes.isfinite().all()
    else:
        assert results[0].pred_instances.masks.shape[1:] == (96, 128)
    if name == 'panoptic':
        assert results[0].pred_panoptic_seg.sem_seg.shape[-2:] == (96, 128)
    if 'Grounding' in name:
        assert set(results[0].pred_instances.label_names) <= set(PHRASES)


@pytest.mark.parametrize('name', ['two-stage', 'DINO', 'DDQ', 'GroundingDINO', 'Mask2Former'])
@pytest.mark.parametrize('encoder', ENCODERS)
def test_gradients_reach_every_parameter_of_the_encoder(build, name, encoder):
    model = build(name, {**LITE, **ENCODERS[encoder]})
    assert without_gradient(model, batch(model)) == []


@pytest.mark.parametrize('name', ['two-stage', 'DINO', 'DDQ', 'GroundingDINO'])
@pytest.mark.parametrize('decoder', DECODERS)
def test_gradients_reach_every_parameter_of_the_decoder(build, name, decoder):
    model = build(name, LITE, decoder=dict(key_aware=True, **DECODERS[decoder]))
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


# --- Which tokens ------------------------------------------------------------------------------


def test_only_the_tokens_of_a_step_are_fused_with_the_text(build):
    model = build('GroundingDINO', LITE).eval()
    fused = []
    for layer in model.encoder.fusion_layers:
        layer.register_forward_hook(lambda module, args, output: fused.append(args[0].shape[1]))
    with torch.no_grad():
        model(**batch(model), mode='predict')
    levels = [math.ceil(128 / stride) ** 2 for stride in (8, 16, 32, 64)]
    assert fused == [sum(levels[1:]), sum(levels)]


def test_low_level_map_of_mask2former_is_the_last(build):
    encoder = encoder_of(build('Mask2Former', LITE))
    sizes = ((2, 3), (4, 6), (8, 12))  # smallest first
    tokens = torch.randn(1, 6 + 24 + 96, 256)
    seen = []
    encoder.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        encoder(tokens, tokens, None, sizes, None, None)
    changed = (seen[0] != tokens).any(-1)[0]
    assert changed[:30].all() and not changed[30:].any()


def test_level_sizes_are_known_without_reading_the_tensor(build, monkeypatch):
    """On a GPU every read of ``spatial_shapes`` would wait for the device."""
    model = build('DINO', LITE, decoder=dict(key_aware=True)).eval()
    data = batch(model)

    def refuse(tensor):
        raise AssertionError(f'read {tuple(tensor.shape)}')

    monkeypatch.setattr(torch.Tensor, 'tolist', refuse)
    with torch.no_grad():
        model(**data, mode='tensor')


@pytest.mark.parametrize('name', ['plain', 'DINO', 'DDQ'])
def test_a_training_step_of_the_encoder_reads_nothing_back(build, name):
    """Meta tensors have no values: any look at one, from maps to memory and back, raises."""
    model = build(name, dict(schedule='-(1+1)x2'))
    data = batch(model)
    features = [feature.detach().to('meta') for feature in model.extract_feat(data['inputs'])]
    features = [feature.requires_grad_() for feature in features]
    model.to('meta')
    encoder_inputs, _ = model.pre_transformer(tuple(features), data['data_samples'])
    memory = model.forward_encoder(**encoder_inputs)['memory']
    memory.sum().backward()
    assert memory.is_meta and all(feature.grad is not None for feature in features)
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    with pytest.raises(Exception, match=r'[Mm]eta'):
        memory.sum().item()


# --- Refusals ----------------------------------------------------------------------------------

SCHEDULES = [
    ({}, r"needs a schedule in its config: encoder=dict\(schedule='H\dL1-\(2\+1\)x3'\)"),
    (dict(schedule='-(2+1)x3'), 'makes 6 layers, but num_layers is 2'),
    (dict(schedule='H1L1-(2+1)x1'), r'is for 2 feature levels, .* use H\dL1'),
]


@pytest.mark.parametrize('name', ['plain', 'DINO', 'DDQ', 'GroundingDINO', 'Mask2Former'])
@pytest.mark.parametrize(('encoder', 'message'), SCHEDULES)
def test_schedules_that_do_not_fit(build, name, encoder, message):
    with pytest.raises(ValueError, match=message):
        build(name, encoder)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(num_feature_levels=5), 'num_feature_levels=5, but its encoder has num_levels=4'),
        (
            dict(test_cfg=dict(max_per_img=300)),
            'max_per_img=300 asks for more predictions than 30 queries of 5 classes give',
        ),
    ],
)
def test_configs_that_do_not_fit(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build('DINO', LITE, **changes)


def test_more_queries_than_tokens(build):
    model = build('DINO', LITE, num_queries=2000)
    with pytest.raises(ValueError, match='num_queries=2000 proposals cannot be chosen'):
        losses(model, batch(model))


def test_more_levels_than_maps():
    layer_cfg = dict(self_attn_cfg=dict(num_levels=4))
    with pytest.raises(ValueError, match='encoder of 4 levels, but only 3 maps'):
        LiteMSDeformAttnPixelDecoder(
            in_channels=[8, 8, 8], encoder=dict(schedule='H3L1-(2+1)x1', layer_cfg=layer_cfg)
        )


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
