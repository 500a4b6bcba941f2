"""Lite detectors and H-Deformable-DETR, one family a file, in MMDetection's ``MODELS``."""

from .ddq_detr import LiteDDQDETR
from .deformable_detr import LiteDeformableDETR
from .dino import LiteDINO
from .grounding_dino import LiteGroundingDINO
from .h_deformable_detr import HDeformableDETR, HDeformableDETRHead, LiteHDeformableDETR
from .lite import LiteDetectorMixin
from .mask2former import LiteMSDeformAttnPixelDecoder

__all__ = [
    'HDeformableDETR',
    'HDeformableDETRHead',
    'LiteDDQDETR',
    'LiteDINO',
    'LiteDeformableDETR',
    'LiteDetectorMixin',
    'LiteGroundingDINO',
    'LiteHDeformableDETR',
    'LiteMSDeformAttnPixelDecoder',
]
