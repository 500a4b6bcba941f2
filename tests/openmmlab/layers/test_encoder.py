import copy
from collections import Counter

import pytest
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmdet.registry import MODELS

from mmlite import ops
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


def inputs(shapes=SHAPES, padded=True):
    """Two images; where padded, their maps end in the same padding."""
    torch.manual_seed(1)
    masks = [torch.zeros(2, h, w, dtype=torch.bool) for h, w in shapes.tolist()]
    if padded:
        for mask in masks:
            mask[-1, :, -(mask.shape[2] // 3) or mask.shape[2] :] = True
    ratios = [((~m[:, :, 0]).float().mean(1), (~m[:, 0]).float().mean(1)) for m in masks]
    tokens = int(shapes.prod(1).sum())
    return dict(
        query=torch.randn(2, tokens, 32),
        query_pos=torch.randn(2, tokens, 32),
        key_padding_mask=torch.cat([m.flatten(1) for m in masks], 1) if padded else None,
        spatial_shapes=shapes,
        level_start_index=torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
        valid_ratios=torch.stack([torch.stack(ratio[::-1], -1) for ratio in ratios], 1),
    )


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
    calls = Counter()
    for number, layer in enumerate(recomputed.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    expected, actual = plain(**arguments), recomputed(**arguments)
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    assert calls == {0: 2, 1: 2, 2: 2, 3: 1}  # the first three again in the backward pass
    for ours, theirs in zip(recomputed.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    recomputed.eval()(**arguments).sum().backward()
    assert calls == {0: 3, 1: 3, 2: 3, 3: 2}


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
            r'is for 3 feature levels, .* num_levels=4; use H3L1-\(2\+1\)x3, H2L2-\(2\+1\)x3$',
        ),
        (dict(schedule='H3L1-(2+1)x3', update='both'), 'update must be one of'),
    ],
)
def test_unfitting_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiteEncoder(**{'layer_cfg': layer_cfg(), **arguments})


@pytest.mark.parametrize('num_layers', [6, 9])  # of the stock encoder, or its own
def test_sequential_keeps_the_stock_number_of_layers_in_the_config(num_layers):
    config = dict(type='LiteEncoder', schedule='H3L1-(2+1)x3', layer_cfg=layer_cfg())
    encoder = MODELS.build(dict(config, update='sequential', num_layers=num_layers))
    assert isinstance(encoder, LiteEncoder)
    assert encoder.num_layers == len(encoder.layers) == 9


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
