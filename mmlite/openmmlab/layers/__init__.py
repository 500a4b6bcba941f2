"""The MMDetection face of :mod:`mmlite.nn`: names in the registry, mmcv's call signature."""

from ...nn import EncoderSchedule, EncoderStep
from .attention import FusedDeformableAttention, KeyAwareDeformableAttention
from .encoder import LiteEncoder, LiteEncoderLayer
from .shapes import level_sizes, remember_level_sizes
from .stock import FusedAttentionHook, fuse_attention

__all__ = [
    'EncoderSchedule',
    'EncoderStep',
    'FusedAttentionHook',
    'FusedDeformableAttention',
    'KeyAwareDeformableAttention',
    'LiteEncoder',
    'LiteEncoderLayer',
    'fuse_attention',
    'level_sizes',
    'remember_level_sizes',
]
