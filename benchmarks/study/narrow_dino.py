"""DINO at any number of channels, for detectors smaller than MMDetection's own.

MMDetection's decoder encodes a box in 4 * 128 channels whatever ``embed_dims`` is, and reads the
encoding through a layer of ``2 * embed_dims`` inputs, which ties its DINO to 256 channels. Here
that layer takes what the encoding gives; at 256 channels nothing differs.
"""

from __future__ import annotations

from mmdet.models.detectors import DINO
from mmdet.models.layers import (
    MLP,
    DeformableDetrTransformerEncoder,
    DinoTransformerDecoder,
    SinePositionalEncoding,
)
from mmdet.registry import MODELS
from torch import nn

from mmlite.openmmlab.detectors.dino import LiteDINO
from mmlite.openmmlab.families import FAMILIES, Family

FAMILIES.append(Family('NarrowDINO', 'LiteNarrowDINO', is_dino=True))

_BOX_CHANNELS = 4 * 128


class NarrowDINODecoder(DinoTransformerDecoder):
    """Decoder of DINO at any number of channels."""

    def _init_layers(self) -> None:
        super()._init_layers()
        self.ref_point_head = MLP(_BOX_CHANNELS, self.embed_dims, self.embed_dims, 2)


@MODELS.register_module()
class NarrowDINO(DINO):
    """MMDetection's ``DINO`` at any ``embed_dims``; its arguments are that one's."""

    def _init_layers(self) -> None:
        self.positional_encoding = SinePositionalEncoding(**self.positional_encoding)
        self.encoder = DeformableDetrTransformerEncoder(**self.encoder)
        self.decoder = NarrowDINODecoder(**self.decoder)
        self.embed_dims = self.encoder.embed_dims
        self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims)
        self.level_embed = nn.Parameter(
            self.query_embedding.weight.new_empty(self.num_feature_levels, self.embed_dims)
        )
        self.memory_trans_fc = nn.Linear(self.embed_dims, self.embed_dims)
        self.memory_trans_norm = nn.LayerNorm(self.embed_dims)


@MODELS.register_module()
class LiteNarrowDINO(LiteDINO, NarrowDINO):
    """:class:`LiteDINO` at any ``embed_dims``."""

    decoder_class = NarrowDINODecoder
