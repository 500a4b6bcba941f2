"""Lite DDQ-DETR."""

from __future__ import annotations

from mmdet.models.detectors import DDQDETR
from mmdet.models.layers import DDQTransformerDecoder
from mmdet.registry import MODELS
from torch import nn

from .lite import LiteDetectorMixin


@MODELS.register_module()
class LiteDDQDETR(LiteDetectorMixin, DDQDETR):
    """DDQ-DETR (Dense Distinct Query, arXiv 2303.12776) with the interleaved encoder."""

    decoder_class = DDQTransformerDecoder

    def _init_queries(self) -> None:
        self.query_embedding = None  # queries are tokens of the memory
        self._init_memory_trans()
        self.query_map = nn.Linear(self.embed_dims, self.embed_dims)

    def pre_decoder(self, *args, **kwargs):
        """As the stock detector's, which fills up queries where there are too few tokens."""
        return DDQDETR.pre_decoder(self, *args, **kwargs)
