"""The authors' parameter names of the encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Module of an encoder layer in the original repositories -> in MMDetection and LiteEncoder.
ENCODER_NAMES = {
    'self_attn': 'self_attn',
    'norm1': 'norms.0',
    'norm2': 'norms.1',
    'linear1': 'ffn.layers.0.0',
    'linear2': 'ffn.layers.1',
    'linear12': 'small_ffn.layers.0.0',
    'linear22': 'small_ffn.layers.1',
    'norm22': 'small_norm',
}
_NAME = re.compile(r'(layers\.\d+)\.(\w+)\.(.+)')


def convert_encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of the authors' encoder to :class:`mmlite.nn.LiteEncoder`'s.

    Their standard attention carries a ``query_proj`` that it never uses; it is left out.

    Args:
        state (Mapping[str, Tensor]): ``layers.<i>.self_attn.*``, ``norm1``, ``linear1``, ...

    Returns:
        dict[str, Tensor]: The same tensors under the names of ``LiteEncoder.state_dict()``.

    Raises:
        ValueError: A name is none of the authors' encoder.
    """
    converted = {}
    for name, tensor in state.items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in ENCODER_NAMES:
            raise ValueError(f"{name} is no parameter of the authors' Lite DETR encoder")
        layer, module, parameter = match.groups()
        unused = f'{layer}.self_attn.attention_weights.weight' in state
        if unused and parameter.startswith('query_proj.'):
            continue
        converted[f'{layer}.{ENCODER_NAMES[module]}.{parameter}'] = tensor
    return converted
