"""The recomputed locations and weights must give the output that the module gave."""

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.detectors import DeformableDETR
from mmdet.models.layers import DeformableDetrTransformerEncoder
from torch import nn

from mmlite.analysis.attention import (
    attention_map,
    deformable_attentions,
    level_masses,
    level_of_queries,
    record_attention,
)
from mmlite.analysis.inputs import encoder_inputs
from mmlite.openmmlab.layers import KeyAwareDeformableAttention, LiteEncoder
from mmlite.ops.reference import sample

SIZES = [(6, 7), (3, 4), (2, 2), (1, 1)]
TOKENS = 59


def modules() -> dict[str, nn.Module]:
    options = {'embed_dims': 32, 'num_heads': 4, 'num_levels': 4, 'num_points': 3, 'dropout': 0.0}
    return {
        'mmcv': MultiScaleDeformableAttention(**options, batch_first=True),
        'kda': KeyAwareDeformableAttention(**options, batch_first=True),
        'kda, sequence first': KeyAwareDeformableAttention(**options),
        'kda, own keys': KeyAwareDeformableAttention(**options, batch_first=True, proj_key=True),
        'kda, same locations': KeyAwareDeformableAttention(
            **options, batch_first=True, same_loc=True
        ),
    }


@pytest.mark.parametrize('dims', [2, 4])
@pytest.mark.parametrize('name', modules())
def test_explains_the_output(name, dims):
    torch.manual_seed(0)
    module = modules()[name].eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = encoder_inputs(SIZES, embed_dims=32, batch_size=2)
    mask, chosen = torch.rand(2, TOKENS) < 0.2, torch.tensor([3, 58, 0])
    tensors = {
        'query': x['query'],
        'value': torch.randn(2, TOKENS, 32),
        'query_pos': x['query_pos'],
    }

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if module.batch_first else tensor.transpose(0, 1)

    call = {
        **{name: turned(tensor) for name, tensor in tensors.items()},
        'key_padding_mask': mask,
        'reference_points': torch.rand(2, TOKENS, 4, dims),
        'spatial_shapes': x['spatial_shapes'],
        'level_start_index': x['level_start_index'],
    }
    query = call.pop('query')
    whole = attention_map(module, {'query': query, **call})
    seen = whole[chosen]
    with torch.no_grad():
        output = turned(module(query, **call))
        value = module.value_proj(tensors['value'][:1]).masked_fill(mask[:1, :, None], 0)
        sampled = sample(
            value.unflatten(-1, (4, 8)), x['spatial_shapes'].tolist(), seen.locations[None]
        )
        attended = (seen.weights.flatten(-2)[None, ..., None] * sampled).sum(-2).flatten(2)
        explained = module.output_proj(attended) + x['query'][:1, chosen]
    torch.testing.assert_close(explained, output[:1, chosen])
    assert len(whole.weights) == TOKENS
    torch.testing.assert_close(seen.weights.sum((-1, -2)), torch.ones(3, 4))


def layer_cfg() -> dict:
    return {
        'self_attn_cfg': {'embed_dims': 32, 'num_heads': 4, 'batch_first': True},
        'ffn_cfg': {'embed_dims': 32, 'feedforward_channels': 16},
    }


class Detector(DeformableDETR):
    """No more of a detector than its encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        nn.Module.__init__(self)
        self.encoder = encoder


def test_recording_changes_nothing_and_leaves_nothing():
    model = Detector(LiteEncoder('H3L1-(2+1)x1', layer_cfg=layer_cfg())).eval()
    inputs = encoder_inputs(SIZES, embed_dims=32)
    names = deformable_attentions(model)
    assert names == ['encoder.layers.0.self_attn', 'encoder.layers.1.self_attn']
    with torch.no_grad():
        plain = model.encoder(**inputs)
        with record_attention(model, names) as maps:
            recorded = model.encoder(**inputs)
    torch.testing.assert_close(recorded, plain, rtol=0, atol=0)
    assert [len(maps[name].weights) for name in names] == [17, TOKENS]
    assert not any(module._forward_pre_hooks for module in model.modules())
    unknown = record_attention(model, ['encoder'])
    with pytest.raises(ValueError, match=r'encoder\.layers\.0\.self_attn'), unknown:
        pass


@pytest.mark.parametrize(
    ('schedule', 'update', 'levels'),
    [
        ('H3L1-(2+1)x1', 'joint', ['123', '0123']),
        ('H3L1-(2+1)x1', 'sequential', ['123', '123', '0']),
        ('H3L1-12:12x1+1234x1', 'joint', ['23', '0123']),  # numbered from the smallest map
        (None, None, ['0123', '0123']),
    ],
)
def test_levels_of_the_queries(schedule, update, levels):
    """Also of a schedule that was chosen among several."""
    if schedule is None:
        encoder = DeformableDetrTransformerEncoder(num_layers=2, layer_cfg=layer_cfg())
    else:
        options = {'layer_cfg': layer_cfg(), 'update': update, 'elastic': [schedule]}
        encoder = LiteEncoder('H3L1-(2+1)x1', **options)
        encoder.use_schedule(schedule)
    for layer, wanted in enumerate(levels):
        found = level_of_queries(encoder, layer, SIZES)
        counts = [h * w if str(level) in wanted else 0 for level, (h, w) in enumerate(SIZES)]
        assert found.bincount(minlength=4).tolist() == counts


def test_level_masses():
    """Queries tell their level, which fixes their attention; what is not updated has none."""
    encoder = LiteEncoder('H3L1-12:12x1+1234x1', layer_cfg=layer_cfg(), key_aware=False).eval()
    inputs, wanted = encoder_inputs(SIZES, embed_dims=32), torch.rand(4, 4)  # query, points
    levels = torch.arange(4).repeat_interleave(torch.tensor(SIZES).prod(1))
    inputs |= {'query': nn.functional.one_hot(levels, 32)[None].float(), 'query_pos': None}
    weight = encoder.layers[0].self_attn.attention_weights.weight.data.view(4, 4, 4, 32)
    weight[..., :4] = wanted.log().T[:, None]
    with torch.no_grad():
        masses = level_masses(Detector(encoder), lambda: encoder(**inputs))
    assert masses[0, :2].isnan().all() and (masses[0, 2:, :2] == 0).all()
    read = wanted[2:, 2:]
    torch.testing.assert_close(masses[0, 2:, 2:], read / read.sum(1, keepdim=True))
    torch.testing.assert_close(masses[1].sum(-1), torch.ones(4))
