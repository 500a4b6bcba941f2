import copy
from collections import Counter

import pytest
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmdet.registry import MODELS

from mmlite.openmmlab.layers import LiteEncoder

SHAPES = torch.tensor([(8, 11), (4, 6), (2, 3), (1, 2)])
LAYER_CFG = dict(
    self_attn_cfg=dict(embed_dims=32, num_heads=4, num_levels=4, dropout=0.0),
    ffn_cfg=dict(embed_dims=32, feedforward_channels=64, ffn_drop=0.0),
)


def lite(schedule, **options):
    """A thin encoder, in which zero-initialised parameters have an influence on the output, too."""
    return randomise(LiteEncoder(schedule, **{'layer_cfg': LAYER_CFG, **options}))


def randomise(module):
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
    config = copy.deepcopy(LAYER_CFG)
    stock = randomise(DeformableDetrTransformerEncoder(num_layers=3, layer_cfg=config))
    encoder = lite('H3L1-(1+1)x3', num_layers=3, key_aware=False, small_ffn=False)
    encoder.load_state_dict(stock.state_dict())
    arguments = inputs(padded=padded)
    torch.testing.assert_close(encoder(**arguments), stock(**arguments), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('update', ['joint', 'sequential'])
@pytest.mark.parametrize('small_ffn', [True, False])
@pytest.mark.parametrize('key_aware', [True, False])
def test_updates_what_the_schedule_says(update, small_ffn, key_aware):
    """Follow the tokens from layer to layer, one plain step after the other."""
    encoder = lite('H2L2-(2+1)x2', key_aware=key_aware, small_ffn=small_ffn, update=update)
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


def test_activation_checkpointing_changes_nothing():
    plain = lite('H3L1-(2+1)x2')
    recomputed = lite('H3L1-(2+1)x2', num_cp=3)
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


def test_inference_leaves_nothing_behind():
    """Neither in its input, nor anything that is tied to the mode it was first needed in."""
    encoder, arguments = lite('H3L1-(2+1)x1'), inputs()
    before = copy.deepcopy(arguments)
    with torch.inference_mode():
        expected = encoder(**arguments)
    for name, value in before.items():
        torch.testing.assert_close(arguments[name], value)
    actual = encoder(**arguments)
    torch.testing.assert_close(actual, expected.clone())
    actual.sum().backward()


@pytest.mark.parametrize('num_layers', [6, 9])  # of the stock encoder, or its own
def test_sequential_keeps_the_stock_number_of_layers_in_the_config(num_layers):
    config = dict(type='LiteEncoder', schedule='H3L1-(2+1)x3', layer_cfg=LAYER_CFG)
    encoder = MODELS.build(dict(config, update='sequential', num_layers=num_layers))
    assert isinstance(encoder, LiteEncoder)
    assert encoder.num_layers == len(encoder.layers) == 9


def test_weights_carry_their_schedule():
    state = lite('H3L1-(2+1)x1').state_dict()
    lite('H3L1-(2+1)x1').load_state_dict(state, strict=True)
    without = {name: value for name, value in state.items() if 'code' not in name}
    lite('H2L2-(2+1)x1').load_state_dict(without, strict=True)  # taken as they are
    for other in (
        dict(schedule='H2L2-(2+1)x1'),  # the same names and shapes
        dict(schedule='H3L1-(1+1)x2'),
        dict(schedule='H3L1-(2+1)x1', update='sequential'),
    ):
        model = lite(**other)
        before = [parameter.clone() for parameter in model.parameters()]
        for strict in (True, False):
            message = r'trained with schedule H3L1-\(2\+1\)x1 and joint updates'
            with pytest.raises(ValueError, match=message):
                model.load_state_dict(state, strict=strict)
        assert all(map(torch.equal, model.parameters(), before))
