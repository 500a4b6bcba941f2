"""MMDetection's deformable decoders with key-aware cross-attention where the config asks for it."""

from __future__ import annotations

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from mmdet.models.layers import DDQTransformerDecoder, DinoTransformerDecoder
from mmdet.models.layers.transformer import (
    DeformableDetrTransformerDecoder,
    DeformableDetrTransformerDecoderLayer,
)
from mmengine.model import ModuleList

from ..layers import KeyAwareDeformableAttention


class KeyAwareDecoderLayer(DeformableDetrTransformerDecoderLayer):
    """A decoder layer whose cross-attention is key-aware; ``cross_attn_cfg`` is of that one."""

    def _init_layers(self) -> None:
        self.self_attn = MultiheadAttention(**self.self_attn_cfg)
        self.cross_attn = KeyAwareDeformableAttention(**self.cross_attn_cfg)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = FFN(**self.ffn_cfg)
        self.norms = ModuleList(
            build_norm_layer(self.norm_cfg, self.embed_dims)[1] for _ in range(3)
        )


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
        asked = [n for n in ('proj_key', 'same_loc') if n in self.layer_cfg['cross_attn_cfg']]
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
