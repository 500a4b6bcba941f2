"""The Lite encoder's modules, registered in MMDetection's ``MODELS``."""

from .attention import FusedDeformableAttention, KeyAwareDeformableAttention
from .encoder import LiteEncoder, LiteEncoderLayer
from .schedule import EncoderSchedule, EncoderStep
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
]
