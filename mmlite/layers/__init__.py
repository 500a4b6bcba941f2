"""The Lite encoder's modules, registered in MMDetection's ``MODELS``."""

from .attention import FusedDeformableAttention, KeyAwareDeformableAttention
from .encoder import LiteEncoder, LiteEncoderLayer
from .schedule import EncoderSchedule, EncoderStep

__all__ = [
    'EncoderSchedule',
    'EncoderStep',
    'FusedDeformableAttention',
    'KeyAwareDeformableAttention',
    'LiteEncoder',
    'LiteEncoderLayer',
]
