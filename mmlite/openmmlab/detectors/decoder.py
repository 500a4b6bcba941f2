"""MMDetection's deformable decoders with key-aware cross-attention where the config asks for it."""

from __future__ import annotations

from mmdet.models.layers import DDQTransformerDecoder, DinoTransformerDecoder
from mmdet.models.layers.transformer import (
    DeformableDetrTransformerDecoder,
    DeformableDetrTransformerDecoderLayer,
)
from mmengine.model import ModuleList

from ..layers import KeyAwareDeformableAttention

# What ``cross_attn_cfg`` may have beside the arguments of standard attention.
_KEY_AWARE = ('proj_key', 'same_loc')


class KeyAwareCrossAttention:
    """Put before a decoder layer of MMDetection: its attention to the image is key-aware."""

    def _init_layers(self) -> None:
        config = self.cross_attn_cfg
        self.cross_attn_cfg = {k: v for k, v in config.items() if k not in _KEY_AWARE}
        super()._init_layers()
        self.cross_attn = KeyAwareDeformableAttention(**config)


class KeyAwareDecoderLayer(KeyAwareCrossAttention, DeformableDetrTransformerDecoderLayer):
    """A decoder layer of Deformable DETR with key-aware cross-attention."""


class LiteDecoder(DeformableDetrTransformerDecoder):
    """Decoder of Deformable DETR. The other families' decoders build on it.

    Args:
        key_aware (bool): Make the cross-attention key-aware, with ``proj_key`` and ``same_loc``
            read from its ``cross_attn_cfg``.
        **kwargs: Those of MMDetection's decoder.

    Raises:
        ValueError: An argument of key-aware attention is given where it is off.
    """

    layer_class = DeformableDetrTransformerDecoderLayer
    key_aware_layer_class = KeyAwareDecoderLayer

    def __init__(self, key_aware: bool = False, **kwargs) -> None:
        self.key_aware = key_aware
        super().__init__(**kwargs)

    def _init_layers(self) -> None:
        if self.post_norm_cfg is not None:
            raise ValueError(f'{type(self).__name__} has no post norm; set post_norm_cfg=None')
        asked = [name for name in _KEY_AWARE if name in self.layer_cfg['cross_attn_cfg']]
        if asked and not self.key_aware:
            raise ValueError(
                f'{" and ".join(asked)} in cross_attn_cfg need key-aware attention; set '
                'decoder=dict(key_aware=True)'
            )
        layer_class = self.key_aware_layer_class if self.key_aware else self.layer_class
        self.layers = ModuleList(layer_class(**self.layer_cfg) for _ in range(self.num_layers))
        self.embed_dims = self.layers[0].embed_dims


# MMDetection's classes come first and add what is theirs to the layers that LiteDecoder builds.
class LiteDINODecoder(DinoTransformerDecoder, LiteDecoder):
    """Decoder of DINO; arguments as for :class:`LiteDecoder`."""


class LiteDDQDecoder(DDQTransformerDecoder, LiteDecoder):
    """Decoder of DDQ; arguments as for :class:`LiteDecoder`."""
