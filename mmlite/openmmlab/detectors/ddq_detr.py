"""Lite DDQ-DETR."""

from __future__ import annotations

from mmdet.models.detectors import DDQDETR
from mmdet.registry import MODELS
from torch import nn

from .decoder import LiteDDQDecoder
from .lite import LiteDetectorMixin


@MODELS.register_module()
class LiteDDQDETR(LiteDetectorMixin, DDQDETR):
    """DDQ-DETR (Dense Distinct Query, arXiv 2303.12776) with the interleaved encoder.

    Arguments are those of MMDetection's ``DDQDETR`` and of :class:`LiteDetectorMixin`.
    """

    decoder_class = LiteDDQDecoder

    def _init_queries(self) -> None:
        self.query_embedding = None  # queries are tokens of the memory
        self._init_memory_trans()
        self.query_map = nn.Linear(self.embed_dims, self.embed_dims)
