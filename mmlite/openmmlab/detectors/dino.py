"""Lite-DINO."""

from __future__ import annotations

from mmdet.models.detectors import DINO
from mmdet.models.layers import DinoTransformerDecoder
from mmdet.registry import MODELS

from .lite import LiteDetectorMixin


@MODELS.register_module()
class LiteDINO(LiteDetectorMixin, DINO):
    """DINO with the interleaved encoder, the paper's main model."""

    decoder_class = DinoTransformerDecoder
