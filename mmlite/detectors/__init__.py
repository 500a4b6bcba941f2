"""Lite detectors and H-Deformable-DETR, one family a file, in MMDetection's ``MODELS``."""

from .deformable_detr import LiteDeformableDETR
from .dino import LiteDINO
from .h_deformable_detr import HDeformableDETR, LiteHDeformableDETR
from .h_deformable_detr_head import HDeformableDETRHead
from .lite import LiteDetectorMixin

__all__ = [
    'HDeformableDETR',
    'HDeformableDETRHead',
    'LiteDINO',
    'LiteDeformableDETR',
    'LiteDetectorMixin',
    'LiteHDeformableDETR',
]
