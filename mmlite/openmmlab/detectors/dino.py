"""Lite-DINO."""

from __future__ import annotations

from mmdet.models.detectors import DINO
from mmdet.registry import MODELS
from torch import nn

from .decoder import LiteDINODecoder
from .lite import LiteDetectorMixin


@MODELS.register_module()
class LiteDINO(LiteDetectorMixin, DINO):
    """DINO with the interleaved encoder, the paper's main model.

    Arguments are those of MMDetection's ``DINO`` and of :class:`LiteDetectorMixin`.
    """

    decoder_class = LiteDINODecoder

    def _init_queries(self) -> None:
        self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims)
        self._init_memory_trans()
