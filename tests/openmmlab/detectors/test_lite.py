import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from small_detectors import DECODERS, ENCODERS, without_gradient

from mmlite.openmmlab.layers import KeyAwareDeformableAttention, LiteEncoder

DEFORMABLE_DETR = 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
REFINE = 'deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py'
TWO_STAGE = 'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'
DINO = 'dino/dino-4scale_r50_8xb2-12e_coco.py'
DDQ = 'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py'
FAMILIES = {
    DEFORMABLE_DETR: 'LiteDeformableDETR',
    REFINE: 'LiteDeformableDETR',
    TWO_STAGE: 'LiteDeformableDETR',
    DINO: 'LiteDINO',
    DDQ: 'LiteDDQDETR',
}
OTHER_STOCK_CONFIGS = {
    'dino/dino-4scale_r50_8xb2-24e_coco.py': 'H3L1-(2+1)x3',
    'dino/dino-4scale_r50_8xb2-36e_coco.py': 'H3L1-(2+1)x3',
    'dino/dino-4scale_r50_improved_8xb2-12e_coco.py': 'H3L1-(2+1)x3',
    'dino/dino-5scale_swin-l_8xb2-12e_coco.py': 'H4L1-(2+1)x3',
    'dino/dino-5scale_swin-l_8xb2-36e_coco.py': 'H3L2-(2+1)x3',
}


@pytest.mark.parametrize('base', [*FAMILIES, *OTHER_STOCK_CONFIGS])
def test_three_lines_turn_every_stock_config_into_lite(user_config, base):
    schedule = OTHER_STOCK_CONFIGS.get(base, 'H3L1-(2+1)x3')
    detector = FAMILIES.get(base, 'LiteDINO')
    config = user_config(
        f'mmdet::{base}', model=dict(type=detector, encoder=dict(schedule=schedule))
    )
    if config.model.backbone.type == 'SwinTransformer':
        config.model.backbone.depths = [1, 1, 1, 1]  # a Swin-L takes seconds to build
    model = MODELS.build(config.model)
    assert type(model).__name__ == detector
    assert str(model.encoder.schedule) == schedule
    assert len(model.encoder.layers) == 6
    assert all(isinstance(x.self_attn, KeyAwareDeformableAttention) for x in model.encoder.layers)
    assert model.encoder.embed_dims == model.embed_dims == 256


@pytest.mark.parametrize('padded', [True, False])
@pytest.mark.parametrize('base', FAMILIES)
def test_stock_schedule_is_the_stock_detector(small_model, randomise, batch, base, padded):
    stock = randomise(small_model(base))
    lite = small_model(
        base,
        type=FAMILIES[base],
        encoder=dict(schedule='H3L1-(1+1)x2', key_aware=False, small_ffn=False),
    )
    lite.load_state_dict(stock.state_dict())

    def losses(model):
        torch.manual_seed(0)  # DINO's denoising queries are random
        losses = model.train()(**batch(model, padded), mode='loss')
        return model.parse_losses(losses)[1]  # some of DDQ's are lists

    expected, actual = losses(stock), losses(lite)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4)

    with torch.no_grad():
        expected = stock.eval()(**batch(stock, padded), mode='predict')
        actual = lite.eval()(**batch(lite, padded), mode='predict')
    for ours, theirs in zip(actual, expected):
        for field in ('scores', 'bboxes', 'labels'):
            torch.testing.assert_close(
                ours.pred_instances[field], theirs.pred_instances[field], atol=1e-3, rtol=1e-4
            )


def test_stock_equivalence_sees_a_difference(small_model, randomise, batch):
    """The comparison above fails where the models do differ."""
    stock = randomise(small_model(DINO))
    lite = small_model(
        DINO,
        type='LiteDINO',
        encoder=dict(schedule='H3L1-(2+1)x1', key_aware=False, small_ffn=False),
    )
    lite.load_state_dict(stock.state_dict())
    with torch.no_grad():
        expected = stock.eval()(**batch(stock), mode='tensor')[0]
        actual = lite.eval()(**batch(lite), mode='tensor')[0]
    assert not torch.allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize('base', FAMILIES)
@pytest.mark.parametrize('key_aware_decoder', [True, False])
def test_trains(small_model, batch, base, key_aware_decoder):
    model = small_model(
        base,
        type=FAMILIES[base],
        encoder=dict(schedule='H3L1-(2+1)x1'),
        decoder=dict(key_aware=key_aware_decoder),
    )
    model.init_weights()
    for layer in model.decoder.layers:
        kda = isinstance(layer.cross_attn, KeyAwareDeformableAttention)
        assert kda == key_aware_decoder
    assert without_gradient(model, batch(model)) == []
    with torch.no_grad():
        results = model.eval()(**batch(model), mode='predict')
    assert len(results) == 2 and results[0].pred_instances.bboxes.isfinite().all()


@pytest.mark.parametrize('base', [TWO_STAGE, DINO, DDQ])
@pytest.mark.parametrize('encoder', ENCODERS)
def test_gradients_reach_every_parameter_of_the_encoder(small_model, batch, base, encoder):
    options = dict(schedule='H3L1-(2+1)x1', **ENCODERS[encoder])
    model = small_model(base, type=FAMILIES[base], encoder=options)
    assert without_gradient(model, batch(model)) == []


@pytest.mark.parametrize('base', [TWO_STAGE, DINO, DDQ])
@pytest.mark.parametrize('decoder', DECODERS)
def test_gradients_reach_every_parameter_of_the_decoder(small_model, batch, base, decoder):
    options = dict(key_aware=True, **DECODERS[decoder])
    encoder = dict(schedule='H3L1-(2+1)x1')
    model = small_model(base, type=FAMILIES[base], encoder=encoder, decoder=options)
    assert without_gradient(model, batch(model)) == []


@pytest.mark.parametrize('base', FAMILIES)
def test_offsets_start_as_the_directional_grid(small_model, base):
    """MMDetection re-initialises every matrix of the encoder and restores only its attention."""
    model = small_model(
        base,
        type=FAMILIES[base],
        encoder=dict(schedule='H3L1-(2+1)x1'),
        decoder=dict(key_aware=True),
    )
    model.init_weights()
    grid = MultiScaleDeformableAttention(embed_dims=256).sampling_offsets.bias
    attentions = [m for m in model.modules() if isinstance(m, KeyAwareDeformableAttention)]
    assert len(attentions) == 4
    for attention in attentions:
        torch.testing.assert_close(attention.sampling_offsets.bias, grid)
        assert not attention.sampling_offsets.weight.any()


def test_level_sizes_are_known_without_reading_the_tensor(small_model, batch, monkeypatch):
    """On a GPU every read of ``spatial_shapes`` would wait for the device."""
    model = small_model(
        DINO, type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x1'), decoder=dict(key_aware=True)
    )
    data = batch(model)
    model.eval()

    def refuse(tensor):
        raise AssertionError(f'read {tuple(tensor.shape)}')

    monkeypatch.setattr(torch.Tensor, 'tolist', refuse)
    with torch.no_grad():
        model(**data, mode='tensor')


def test_options_reach_the_layers(small_model):
    model = small_model(
        DINO,
        type='LiteDINO',
        encoder=dict(
            schedule='H3L1-(2+1)x1',
            update='sequential',
            layer_cfg=dict(self_attn_cfg=dict(proj_key=True)),
            num_cp=1,
        ),
        decoder=dict(
            key_aware=True, layer_cfg=dict(cross_attn_cfg=dict(proj_key=True, same_loc=True))
        ),
    )
    assert isinstance(model.encoder, LiteEncoder)
    assert len(model.encoder.layers) == 3 and model.encoder.num_cp == 1
    assert all(layer.self_attn.proj_key for layer in model.encoder.layers)
    cross_attn = model.decoder.layers[0].cross_attn
    assert cross_attn.proj_key and cross_attn.same_loc and cross_attn.batch_first


def test_bfloat16_autocast_stays_close(small_model, batch):
    model = small_model(DINO, type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x1'))
    model.init_weights()

    def losses(enabled):
        torch.manual_seed(0)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            return sum(model.train()(**batch(model), mode='loss').values())

    exact, rounded = losses(False), losses(True)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.0)
    rounded.backward()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        results = model.eval()(**batch(model), mode='predict')
    assert results[0].pred_instances.scores.isfinite().all()


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (dict(), 'LiteDINO needs a schedule in its config'),
        (dict(encoder=dict(schedule='H3L1-(2+1)x3')), 'makes 6 layers, but num_layers is 2'),
        (dict(encoder=dict(schedule='H2L1-(2+1)x1')), 'is for 3 feature levels'),
        (
            dict(encoder=dict(schedule='H3L1-(2+1)x1'), num_feature_levels=5),
            'num_feature_levels=5, but its encoder has num_levels=4',
        ),
        (
            dict(encoder=dict(schedule='H3L1-(2+1)x1'), test_cfg=dict(max_per_img=300)),
            'max_per_img=300 asks for more predictions than 30 queries of 5 classes give',
        ),
    ],
)
def test_configs_that_do_not_fit(small_model, overrides, message):
    with pytest.raises(ValueError, match=message):
        small_model(DINO, type='LiteDINO', **overrides)


@pytest.mark.parametrize('base', FAMILIES)
def test_a_schedule_for_another_number_of_levels(small_model, base):
    with pytest.raises(ValueError, match=r'is for 3 feature levels, .* use H3L1'):
        small_model(base, type=FAMILIES[base], encoder=dict(schedule='H2L1-(2+1)x1'))


def test_more_queries_than_tokens(small_model, batch):
    model = small_model(
        DINO, type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x1'), num_queries=2000
    )
    with pytest.raises(ValueError, match='num_queries=2000 proposals cannot be chosen'):
        model.train()(**batch(model), mode='loss')


@pytest.mark.parametrize('base', [DEFORMABLE_DETR, DINO, DDQ])
def test_a_training_step_of_the_encoder_reads_nothing_back(small_model, batch, base):
    """Meta tensors have no values: any look at one, from maps to memory and back, raises."""
    model = small_model(base, type=FAMILIES[base], encoder=dict(schedule='H3L1-(1+1)x2'))
    data = batch(model, padded=True)
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
