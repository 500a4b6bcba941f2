"""Lite Deformable DETR."""

from __future__ import annotations

from mmdet.models.detectors import DeformableDETR
from mmdet.registry import MODELS
from torch import nn

from .lite import LiteDetectorMixin


@MODELS.register_module()
class LiteDeformableDETR(LiteDetectorMixin, DeformableDETR):
    """Deformable DETR, plain, refining or two-stage, with the interleaved encoder."""

    def _init_queries(self) -> None:
        if self.as_two_stage:
            self._init_memory_trans()
            self.pos_trans_fc = nn.Linear(2 * self.embed_dims, 2 * self.embed_dims)
            self.pos_trans_norm = nn.LayerNorm(2 * self.embed_dims)
        else:  # what a query looks for and where are learned together
            self.query_embedding = nn.Embedding(self.num_queries, 2 * self.embed_dims)
            self.reference_points_fc = nn.Linear(self.embed_dims, 2)
