"""Lite-DINO."""

from __future__ import annotations

from mmdet.models.detectors import DINO
from mmdet.models.layers import MLP, DinoTransformerDecoder
from mmdet.registry import MODELS

from .lite import LiteDetectorMixin


class DINODecoder(DinoTransformerDecoder):
    """MMDetection's decoder of DINO at any number of channels.

    That one encodes a box in 4 * 128 channels whatever ``embed_dims`` is, and reads the encoding
    through a layer of ``2 * embed_dims`` inputs.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        if self.embed_dims != 256:
            self.ref_point_head = MLP(4 * 128, self.embed_dims, self.embed_dims, 2)


@MODELS.register_module()
class LiteDINO(LiteDetectorMixin, DINO):
    """DINO with the interleaved encoder, the paper's main model."""

    decoder_class = DINODecoder
