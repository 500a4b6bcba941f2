import copy

import pytest
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmdet.registry import MODELS

from mmlite import ops
from mmlite.openmmlab.checkpoints import convert_encoder_state
from mmlite.openmmlab.layers import LiteEncoder

SHAPES = torch.tensor([(8, 11), (4, 6), (2, 3), (1, 2)])


def layer_cfg(num_levels=4):
    return dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4, num_levels=num_levels, dropout=0.0),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=64, ffn_drop=0.0),
    )


def randomise(module):
    """Give every parameter an influence on the output, zero-initialised ones too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def inputs(shapes=SHAPES, batch=2, padded=True):
    torch.manual_seed(1)
    tokens = int(shapes.prod(1).sum())
    valid_ratios = torch.ones(batch, len(shapes), 2)
    mask = None
    if padded:
        masks = [torch.zeros(batch, h, w, dtype=torch.bool) for h, w in shapes.tolist()]
        for level_mask in masks:
            level_mask[-1, :, -(level_mask.shape[2] // 3) or level_mask.shape[2] :] = True
        valid_ratios = torch.stack(
            [
                torch.stack([(~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)], -1)
                for m in masks
            ],
            1,
        )
        mask = torch.cat([m.flatten(1) for m in masks], 1)
    return dict(
        query=torch.randn(batch, tokens, 32),
        query_pos=torch.randn(batch, tokens, 32),
        key_padding_mask=mask,
        spatial_shapes=shapes,
        level_start_index=torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
        valid_ratios=valid_ratios,
    )


@pytest.mark.parametrize('name', ['h2l2_2p1x3', 'h3l1_2p1x3', 'h3l1_6p1x1_nokda'])
def test_golden(golden, name):
    arrays, meta = golden(f'encoder_{name}.npz')
    size = meta['embed_dims']
    encoder = LiteEncoder(
        schedule=meta['schedule'],
        num_layers=meta['num_layers'],
        layer_cfg=dict(
            self_attn_cfg=dict(
                embed_dims=size, num_heads=meta['num_heads'], num_points=meta['num_points']
            ),
            ffn_cfg=dict(embed_dims=size, feedforward_channels=meta['feedforward_channels']),
        ),
        key_aware=meta['key_aware'],
        small_ffn=meta['small_ffn'],
    ).eval()
    official = {k[len('state.') :]: v for k, v in arrays.items() if k.startswith('state.')}
    encoder.load_state_dict(convert_encoder_state(official))
    shapes = arrays['spatial_shapes']
    memory = encoder(
        query=arrays['feat'],
        query_pos=arrays['pos'],
        key_padding_mask=arrays['key_padding_mask'],
        spatial_shapes=shapes,
        level_start_index=torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
        valid_ratios=arrays['valid_ratios'],
    )
    torch.testing.assert_close(memory, arrays['memory'], atol=1e-4, rtol=0)


@pytest.mark.parametrize('padded', [True, False])
def test_every_level_every_layer_is_the_stock_encoder(padded):
    stock = randomise(DeformableDetrTransformerEncoder(num_layers=3, layer_cfg=layer_cfg()))
    lite = LiteEncoder(
        'H3L1-(1+1)x3', num_layers=3, layer_cfg=layer_cfg(), key_aware=False, small_ffn=False
    )
    lite.load_state_dict(stock.state_dict())
    arguments = inputs(padded=padded)
    torch.testing.assert_close(lite(**arguments), stock(**arguments), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('update', ['joint', 'sequential'])
@pytest.mark.parametrize('small_ffn', [True, False])
@pytest.mark.parametrize('key_aware', [True, False])
def test_updates_what_the_schedule_says(update, small_ffn, key_aware):
    """Follow the tokens from layer to layer, one plain step after the other."""
    encoder = randomise(
        LiteEncoder(
            'H2L2-(2+1)x2',
            layer_cfg=layer_cfg(),
            key_aware=key_aware,
            small_ffn=small_ffn,
            update=update,
        )
    )
    arguments = inputs()
    num_low = int(SHAPES[:2].prod(1).sum())
    points = DeformableDetrTransformerEncoder.get_encoder_reference_points(
        SHAPES, arguments['valid_ratios'], 'cpu'
    )
    is_low = torch.arange(points.shape[1]) < num_low
    memory = arguments['query']
    order = {'joint': ['high', 'all'] * 2, 'sequential': ['high', 'high', 'low'] * 2}[update]
    assert len(encoder.layers) == len(order)
    for kind, layer in zip(order, encoder.layers):
        attended = layer.norms[0](
            layer.self_attn(
                memory,
                query_pos=arguments['query_pos'],
                key_padding_mask=arguments['key_padding_mask'],
                reference_points=points,
                spatial_shapes=SHAPES,
            )
        )
        if kind != 'low' or not small_ffn:
            normal = layer.norms[1](layer.ffn(attended))
        if kind != 'high' and small_ffn:
            small = layer.small_norm(layer.small_ffn(attended))
        else:
            small = normal
        updated = torch.where(is_low[:, None], small, normal if kind != 'low' else memory)
        keep = is_low if kind == 'high' else torch.zeros_like(is_low)
        memory = torch.where(keep[:, None], memory, updated)
    torch.testing.assert_close(encoder(**arguments), memory, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('num_levels', [3, 5])
def test_other_numbers_of_levels(num_levels):
    shapes = torch.tensor([(9, 13), (5, 7), (3, 4), (2, 2), (1, 1)])[:num_levels]
    encoder = randomise(
        LiteEncoder(f'H{num_levels - 1}L1-(2+1)x1', num_layers=2, layer_cfg=layer_cfg(num_levels))
    )
    arguments = inputs(shapes)
    memory = encoder(**arguments)
    assert memory.shape == arguments['query'].shape
    assert memory.isfinite().all()


@pytest.mark.parametrize('update', ['joint', 'sequential'])
@pytest.mark.parametrize('small_ffn', [True, False])
@pytest.mark.parametrize('key_aware', [True, False])
def test_every_parameter_gets_a_gradient(update, small_ffn, key_aware):
    encoder = randomise(
        LiteEncoder(
            'H3L1-(2+1)x1',
            layer_cfg=layer_cfg(),
            update=update,
            small_ffn=small_ffn,
            key_aware=key_aware,
        )
    )
    encoder(**inputs()).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def run_and_count_saved_bytes(encoder, arguments):
    """Output of the encoder, and what autograd keeps for backward beside the parameters."""
    storages = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = encoder(**arguments)
    return output, sum(storages.values())


@pytest.mark.skipif(
    not any(b.available for b in ops.backends() if b.name == 'cpu'),
    reason='the PyTorch formulation keeps every sample; the fused CPU kernels are not built',
)
def test_training_memory_follows_the_schedule():
    """What backward keeps, against an encoder that updates every level in every layer."""
    cfg = layer_cfg()
    cfg['ffn_cfg'] = dict(embed_dims=32, feedforward_channels=256)  # 8 times as wide, as in DINO
    arguments = inputs(torch.tensor([(24, 32), (12, 16), (6, 8), (3, 4)]), padded=False)
    stock = LiteEncoder('H3L1-(1+1)x6', layer_cfg=cfg, key_aware=False, small_ffn=False)
    _, stock_bytes = run_and_count_saved_bytes(stock, arguments)
    _, lite_bytes = run_and_count_saved_bytes(LiteEncoder('H3L1-(2+1)x3', 6, cfg), arguments)
    assert lite_bytes < 0.56 * stock_bytes


def test_activation_checkpointing_changes_nothing():
    plain = randomise(LiteEncoder('H3L1-(2+1)x2', layer_cfg=layer_cfg()))
    recomputed = LiteEncoder('H3L1-(2+1)x2', layer_cfg=layer_cfg(), num_cp=3)
    recomputed.load_state_dict(plain.state_dict())
    arguments = inputs()
    expected, plain_bytes = run_and_count_saved_bytes(plain, arguments)
    actual, recomputed_bytes = run_and_count_saved_bytes(recomputed, arguments)
    torch.testing.assert_close(actual, expected)
    assert recomputed_bytes < 0.6 * plain_bytes
    expected.sum().backward()
    actual.sum().backward()
    for ours, theirs in zip(recomputed.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_input_is_left_alone():
    encoder = randomise(LiteEncoder('H3L1-(2+1)x1', layer_cfg=layer_cfg()))
    arguments = inputs()
    before = copy.deepcopy(arguments)
    with torch.inference_mode():
        encoder(**arguments)
    for name, value in before.items():
        torch.testing.assert_close(arguments[name], value)


def test_usable_for_training_after_inference():
    """Nothing may be kept that is tied to the mode it was first needed in."""
    encoder = randomise(LiteEncoder('H3L1-(2+1)x1', layer_cfg=layer_cfg()))
    arguments = inputs(torch.tensor([(6, 5), (3, 3), (2, 2), (1, 1)]))
    with torch.inference_mode():
        expected = encoder(**arguments)
    actual = encoder(**arguments)
    torch.testing.assert_close(actual, expected.clone())
    actual.sum().backward()


def test_bfloat16_autocast_stays_close():
    encoder = randomise(LiteEncoder('H3L1-(2+1)x2', layer_cfg=layer_cfg()))
    arguments = inputs()
    expected = encoder(**arguments)
    with torch.autocast('cpu', torch.bfloat16):
        actual = encoder(**arguments)
    actual.float().square().mean().backward()
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < 0.03
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_registered():
    encoder = MODELS.build(
        dict(type='LiteEncoder', schedule='H3L1-(2+1)x3', num_layers=6, layer_cfg=layer_cfg())
    )
    assert isinstance(encoder, LiteEncoder)
    assert MODELS.get('KeyAwareDeformableAttention') is not None


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(schedule='H3L1'), 'not of the form'),
        (
            dict(schedule='H3L1-(2+1)x3', num_layers=4),
            r'makes 6 layers, but num_layers is 4; use one of H3L1-\(1\+1\)x4, H3L1-\(2\+1\)x2',
        ),
        (
            dict(schedule='H2L1-(2+1)x3', num_layers=6, layer_cfg=layer_cfg()),
            r'is for 3 feature levels, .* num_levels=4; use H3L1-\(2\+1\)x3, H2L2-\(2\+1\)x3',
        ),
        (dict(schedule='H3L1-(2+1)x3', update='both'), 'update must be one of'),
    ],
)
def test_unfitting_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiteEncoder(**{'layer_cfg': layer_cfg(), **arguments})


def test_sequential_keeps_the_stock_number_of_layers_in_the_config():
    encoder = LiteEncoder('H3L1-(2+1)x3', 6, layer_cfg(), update='sequential')
    assert encoder.num_layers == len(encoder.layers) == 9


def test_unfitting_features():
    encoder = LiteEncoder('H3L1-(2+1)x1', layer_cfg=layer_cfg())
    with pytest.raises(ValueError, match='takes 4 feature levels; got 3'):
        encoder(**inputs(SHAPES[:3]))


def test_weights_carry_their_schedule():
    encoder = LiteEncoder('H3L1-(2+1)x1', layer_cfg=layer_cfg())
    state = encoder.state_dict()
    LiteEncoder('H3L1-(2+1)x1', layer_cfg=layer_cfg()).load_state_dict(state, strict=True)
    for other in (
        dict(schedule='H2L2-(2+1)x1'),  # the same names and shapes
        dict(schedule='H3L1-(1+1)x2'),
        dict(schedule='H3L1-(2+1)x1', update='sequential'),
    ):
        model = LiteEncoder(**other, layer_cfg=layer_cfg())
        before = [parameter.clone() for parameter in model.parameters()]
        for strict in (True, False):
            message = r'trained with schedule H3L1-\(2\+1\)x1 and joint updates'
            with pytest.raises(ValueError, match=message):
                model.load_state_dict(state, strict=strict)
        assert all(map(torch.equal, model.parameters(), before))


def test_weights_without_a_schedule_are_taken_as_they_are():
    encoder = LiteEncoder('H3L1-(2+1)x1', layer_cfg=layer_cfg())
    state = {name: value for name, value in encoder.state_dict().items() if 'code' not in name}
    encoder.load_state_dict(state, strict=True)
