"""What the encoder of a config costs, counted without building the model around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmdet.models.layers.transformer import GroundingDinoTransformerEncoder
from torch import nn

from ..openmmlab.families import find_holder, is_lite, resolve
from .complexity import count_flops
from .inputs import encoder_inputs, level_sizes

# Words of a text that names COCO's 80 classes, about.
WORDS = 200


def encoder_flops(model_config: dict, image_size: tuple[int, int]) -> int:
    """FLOPs of the multi-scale encoder of a config on one image.

    That of Grounding DINO includes the fusion with a text of :data:`WORDS` words and the layers of
    the text.

    Args:
        model_config (dict): ``model`` of a config, stock or Lite.
        image_size (tuple[int, int]): Height and width in pixels.

    Raises:
        ValueError: The config has no such encoder.
    """
    _, part, family = find_holder(model_config)
    encoder = _build(part).eval()
    attention = part['encoder']['layer_cfg'].get('self_attn_cfg') or {}
    dims = attention.get('embed_dims', 256)
    sizes = level_sizes(image_size, strides(model_config, attention.get('num_levels', 4)))
    if family.smallest_first:
        sizes = sizes[::-1]
    inputs = encoder_inputs(sizes, dims)
    if 'text_layer_cfg' in part['encoder']:
        inputs.update(
            memory_text=torch.zeros(1, WORDS, dims),
            text_attention_mask=torch.zeros(1, WORDS, dtype=torch.bool),
            position_ids=torch.zeros(1, WORDS, dtype=torch.long),
            text_self_attention_masks=torch.ones(1, WORDS, WORDS, dtype=torch.bool),
        )
    return count_flops(encoder, **inputs).total


def strides(model_config: dict, num_levels: int) -> Sequence[int]:
    """Strides of the encoder's levels, largest map first, read off backbone and neck."""
    indices = model_config['backbone'].get('out_indices', (0, 1, 2, 3))
    found = [4 * 2**index for index in indices]
    if find_holder(model_config)[2].smallest_first:
        return found[-num_levels:]
    while len(found) < num_levels:  # made by strided convolutions
        found.append(2 * found[-1])
    return found[:num_levels]


def _build(part: dict) -> nn.Module:
    config = {name: value for name, value in part['encoder'].items() if name != 'num_cp'}
    if is_lite(part['type']):
        return resolve(part['type']).encoder_class(**config)
    is_fused = 'text_layer_cfg' in config
    return (GroundingDinoTransformerEncoder if is_fused else DeformableDetrTransformerEncoder)(
        **config
    )
