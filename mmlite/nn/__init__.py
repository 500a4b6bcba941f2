"""The core of mmlite in plain PyTorch: schedule, attention, encoder.

Nothing here knows of MMDetection; shapes are Python ints, and no value is read out of a tensor, so
that everything compiles, exports and can be captured.
"""

from .attention import DeformableAttention, KeyAwareDeformableAttention, directional_grid
from .encoder import FFN, InterleavedEncoder, LiteEncoder, LiteEncoderLayer
from .geometry import encoder_reference_points
from .schedule import EncoderSchedule, EncoderStep
from .tokens import StepTokens, TokenRun

__all__ = [
    'FFN',
    'DeformableAttention',
    'EncoderSchedule',
    'EncoderStep',
    'InterleavedEncoder',
    'KeyAwareDeformableAttention',
    'LiteEncoder',
    'LiteEncoderLayer',
    'StepTokens',
    'TokenRun',
    'directional_grid',
    'encoder_reference_points',
]
