"""Grounding DINO with a tiny BERT that the tests make: equal to stock, and who is fused when."""

from __future__ import annotations

import math

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from small_detectors import DECODERS, ENCODERS, without_gradient

from mmlite.openmmlab.detectors.grounding_dino import adapt_bert

STOCK = 'grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py'
MM = 'mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365.py'
WORDS = [
    '[PAD]',
    '[UNK]',
    '[CLS]',
    '[SEP]',
    '[MASK]',
    '.',
    '?',
    'red',
    'green',
    'blue',
    'circle',
    'square',
]
PHRASES = ('red circle', 'green square', 'square', 'blue circle', 'circle')
EVERY_LEVEL = dict(schedule='H3L1-(1+1)x2', key_aware=False, small_ffn=False)


@pytest.fixture
def grounding_dino(small_model, tiny_bert):
    """A small stock Grounding DINO, or a Lite one where arguments of its encoder are given."""

    def build(base: str = STOCK, encoder: dict | None = None, **model) -> torch.nn.Module:
        model.update(
            language_model=dict(name=tiny_bert),
            encoder=dict(
                fusion_layer_cfg=dict(dropout=0.0, embed_dim=64, init_values=0.5),
                text_layer_cfg=dict(ffn_cfg=dict(feedforward_channels=64)),
                # Recomputing activations takes fairscale in the stock encoder.
                **({'num_cp': -1} if encoder is None else {'num_cp': 1, **encoder}),
            ),
        )
        if encoder is not None:
            model['type'] = 'LiteGroundingDINO'
        built = small_model(base, **model)
        adapt_bert(built.language_model)
        return built

    return build


def batch(model: torch.nn.Module, texts: tuple = (PHRASES, PHRASES), padded: bool = True) -> dict:
    sizes = [(3, 96, 128), (3, 128, 80)] if padded else [(3, 96, 128)] * 2
    packed = demo_mm_inputs(2, sizes, num_items=[3, 2], num_classes=3)
    for sample, text in zip(packed['data_samples'], texts):
        sample.set_metainfo(dict(text=text, custom_entities=True))
    return model.data_preprocessor(packed, training=True)


@pytest.mark.parametrize(
    ('texts', 'padded'), [((PHRASES, PHRASES), True), ((PHRASES, PHRASES[2:]), False)]
)
def test_stock_schedule_is_the_stock_detector(grounding_dino, randomise, texts, padded):
    stock, lite = randomise(grounding_dino()), grounding_dino(encoder=EVERY_LEVEL)
    lite.load_state_dict(stock.state_dict())

    def losses(model):
        torch.manual_seed(0)  # denoising queries are random
        losses = model.train()(**batch(model, texts, padded), mode='loss')
        sum(losses.values()).backward()
        return {**losses, 'gradient': model.text_feat_map.weight.grad}

    expected, actual = losses(stock), losses(lite)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-4, rtol=1e-3)

    with torch.no_grad():
        expected = stock.eval()(**batch(stock, texts, padded), mode='predict')
        actual = lite.eval()(**batch(lite, texts, padded), mode='predict')
    for ours, theirs in zip(actual, expected):
        for field in ('scores', 'bboxes', 'labels'):
            torch.testing.assert_close(
                ours.pred_instances[field], theirs.pred_instances[field], atol=1e-3, rtol=1e-4
            )


def test_only_the_tokens_of_a_step_are_fused(grounding_dino):
    model = grounding_dino(encoder=dict(schedule='H3L1-(2+1)x1')).eval()
    fused = []
    for layer in model.encoder.fusion_layers:
        layer.register_forward_hook(lambda module, args, output: fused.append(args[0].shape[1]))
    with torch.no_grad():
        model(**batch(model), mode='predict')
    levels = [math.ceil(128 / stride) ** 2 for stride in (8, 16, 32, 64)]
    assert fused == [sum(levels[1:]), sum(levels)]


@pytest.mark.parametrize('base', [STOCK, MM])
@pytest.mark.parametrize('key_aware_decoder', [True, False])
def test_trains(grounding_dino, base, key_aware_decoder):
    model = grounding_dino(
        base,
        dict(schedule='H3L1-(2+1)x1'),
        decoder=dict(key_aware=key_aware_decoder),
    )
    model.init_weights()
    assert without_gradient(model, batch(model)) == []
    with torch.no_grad():
        results = model.eval()(**batch(model), mode='predict')
    assert results[0].pred_instances.bboxes.isfinite().all()
    assert set(results[0].pred_instances.label_names) <= set(PHRASES)


@pytest.mark.parametrize('encoder', ENCODERS)
def test_gradients_reach_every_parameter_of_the_encoder(grounding_dino, encoder):
    model = grounding_dino(encoder=dict(schedule='H3L1-(2+1)x1', **ENCODERS[encoder]))
    assert without_gradient(model, batch(model)) == []


@pytest.mark.parametrize('decoder', DECODERS)
def test_gradients_reach_every_parameter_of_the_decoder(grounding_dino, decoder):
    options = dict(key_aware=True, **DECODERS[decoder])
    model = grounding_dino(encoder=dict(schedule='H3L1-(2+1)x1'), decoder=options)
    assert without_gradient(model, batch(model)) == []


def test_schedule_that_does_not_fit(grounding_dino):
    with pytest.raises(ValueError, match='LiteGroundingDINO needs a schedule'):
        grounding_dino(encoder={})
    with pytest.raises(ValueError, match='is for 3 feature levels'):
        grounding_dino(encoder=dict(schedule='H2L1-(2+1)x1'))
