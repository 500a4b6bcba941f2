import pytest
import torch

from mmlite.openmmlab.checkpoints import convert_encoder_state


def test_renames():
    value = torch.zeros(1)
    converted = convert_encoder_state(
        {
            'layers.1.linear12.weight': value,
            'layers.1.norm22.bias': value,
            'layers.1.self_attn.query_proj.weight': value,
        }
    )
    assert set(converted) == {
        'layers.1.small_ffn.layers.0.0.weight',
        'layers.1.small_norm.bias',
        'layers.1.self_attn.query_proj.weight',
    }


@pytest.mark.parametrize(
    'name', ['layers.0.linear3.weight', 'norm.weight', 'layers.0.norms.0.bias']
)
def test_foreign_names(name):
    with pytest.raises(ValueError, match='no place in the authors'):
        convert_encoder_state({name: torch.zeros(1)})
