"""DINO at any number of channels, for detectors smaller than MMDetection's own.

MMDetection's decoder ties its DINO to 256 channels; Lite-DINO's takes any.
"""

from __future__ import annotations

from mmdet.models.detectors import DINO
from mmdet.models.layers import (
    DeformableDetrTransformerEncoder,
    SinePositionalEncoding,
)
from mmdet.registry import MODELS
from torch import nn

from mmlite.openmmlab.detectors.dino import DINODecoder, LiteDINO
from mmlite.openmmlab.families import FAMILIES, Family

FAMILIES.append(Family('NarrowDINO', 'LiteNarrowDINO', is_dino=True))


@MODELS.register_module()
class NarrowDINO(DINO):
    """MMDetection's ``DINO`` at any ``embed_dims``; its arguments are that one's."""

    def _init_layers(self) -> None:
        self.positional_encoding = SinePositionalEncoding(**self.positional_encoding)
        self.encoder = DeformableDetrTransformerEncoder(**self.encoder)
        self.decoder = DINODecoder(**self.decoder)
        self.embed_dims = self.encoder.embed_dims
        self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims)
        self.level_embed = nn.Parameter(
            self.query_embedding.weight.new_empty(self.num_feature_levels, self.embed_dims)
        )
        self.memory_trans_fc = nn.Linear(self.embed_dims, self.embed_dims)
        self.memory_trans_norm = nn.LayerNorm(self.embed_dims)


@MODELS.register_module()
class LiteNarrowDINO(LiteDINO, NarrowDINO):
    """The Lite variant of :class:`NarrowDINO`."""
