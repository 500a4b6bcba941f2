"""What makes a detector of MMDetection a Lite one."""

from __future__ import annotations

import copy

import torch
from mmdet.models.layers import SinePositionalEncoding
from mmdet.models.layers.transformer import DeformableDetrTransformerDecoder
from torch import Tensor, nn

from ..families import num_levels_of
from ..layers import KeyAwareDeformableAttention, LiteEncoder, remember_level_sizes

# What ``cross_attn_cfg`` may have beside the arguments of standard attention.
_KEY_AWARE = ('proj_key', 'same_loc')


class LiteDetectorMixin:
    """Builds a detector of MMDetection around :class:`LiteEncoder`.

    Put before a detector with a deformable encoder. A family says which decoder it has, and builds
    what is left over in the order of MMDetection, which is that of an optimiser's state.

    Arguments are those of the stock detector. ``encoder`` takes those of ``LiteEncoder``, too;
    ``schedule`` has to be given. ``decoder=dict(key_aware=True)`` makes the decoder's
    cross-attention key-aware, with ``proj_key`` and ``same_loc`` read from its ``cross_attn_cfg``.

    Raises:
        ValueError: The schedule is missing or does not fit, the config asks for more predictions
            than the queries give, or for an argument of key-aware attention where it is off.
    """

    encoder_class: type[LiteEncoder] = LiteEncoder
    decoder_class: type[nn.Module] = DeformableDetrTransformerDecoder

    def __init__(self, *args, **kwargs) -> None:
        # MMDetection's constructors write into their configs, and refuse what is written there
        # already. A wrapper such as SemiBaseDetector builds two detectors of one config.
        super().__init__(*copy.deepcopy(args), **copy.deepcopy(kwargs))

    def _init_layers(self) -> None:
        self._check_config()
        self.positional_encoding = SinePositionalEncoding(**self.positional_encoding)
        self.encoder = self.encoder_class(**self.encoder)
        self.decoder = _build_decoder(self.decoder_class, **self.decoder)
        self.embed_dims = self.encoder.embed_dims
        channels = 2 * self.positional_encoding.num_feats
        if channels != self.embed_dims:
            raise ValueError(
                f'positional_encoding has {channels} channels, the encoder {self.embed_dims}; set '
                f'positional_encoding=dict(num_feats={self.embed_dims // 2})'
            )
        self.level_embed = nn.Parameter(torch.empty(self.num_feature_levels, self.embed_dims))
        self._init_queries()

    def _init_queries(self) -> None:
        """Build what makes the decoder's queries; here learned contents at chosen tokens."""
        self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims)
        self._init_memory_trans()

    def _init_memory_trans(self) -> None:
        self.memory_trans_fc = nn.Linear(self.embed_dims, self.embed_dims)
        self.memory_trans_norm = nn.LayerNorm(self.embed_dims)

    def _check_config(self) -> None:
        name = type(self).__name__
        num_levels = checked_levels(name, self.encoder)
        if num_levels != self.num_feature_levels:
            raise ValueError(
                f'{name} has num_feature_levels={self.num_feature_levels}, but its encoder has '
                f'num_levels={num_levels}; set both to the number of maps the neck gives'
            )
        most = self.num_queries * self.bbox_head.num_classes
        asked = (self.test_cfg or {}).get('max_per_img', 0)
        if asked > most:
            raise ValueError(
                f'test_cfg.max_per_img={asked} asks for more predictions than {self.num_queries} '
                f'queries of {self.bbox_head.num_classes} classes give; lower it to {most} or '
                'raise num_queries'
            )

    def pre_transformer(self, mlvl_feats: tuple[Tensor, ...], *args, **kwargs):
        """As the stock detector's; the level sizes are known from the feature maps."""
        inputs = super().pre_transformer(mlvl_feats, *args, **kwargs)
        sizes = [tuple(feat.shape[-2:]) for feat in mlvl_feats]
        for part in inputs:  # those of the encoder and those of the decoder
            remember_level_sizes(part['spatial_shapes'], sizes)
        return inputs

    def pre_decoder(self, memory: Tensor, *args, **kwargs):
        """As the stock detector's; refuses images with fewer tokens than queries to choose."""
        if self.as_two_stage and memory.shape[1] < self.num_queries:
            raise ValueError(
                f'num_queries={self.num_queries} proposals cannot be chosen from the '
                f'{memory.shape[1]} tokens of these images; use larger images or fewer queries'
            )
        return super().pre_decoder(memory, *args, **kwargs)


def _build_decoder(decoder_class: type[nn.Module], key_aware: bool = False, **config) -> nn.Module:
    cross_attn_cfg = config['layer_cfg']['cross_attn_cfg']
    asked = {name: cross_attn_cfg.pop(name) for name in _KEY_AWARE if name in cross_attn_cfg}
    if asked and not key_aware:
        raise ValueError(
            f'{" and ".join(asked)} in cross_attn_cfg need key-aware attention; set '
            'decoder=dict(key_aware=True)'
        )
    decoder = decoder_class(**config)
    decoder.key_aware = key_aware
    if key_aware:
        for layer in decoder.layers:
            layer.cross_attn = KeyAwareDeformableAttention(**layer.cross_attn_cfg, **asked)
    return decoder


def checked_levels(name: str, encoder: dict) -> int:
    """Number of levels of the encoder of a Lite model ``name``; its config needs a schedule."""
    num_levels = num_levels_of(encoder)
    if 'schedule' not in encoder:
        raise ValueError(
            f'{name} needs a schedule in its config: '
            f"encoder=dict(schedule='H{num_levels - 1}L1-(2+1)x3')"
        )
    return num_levels
