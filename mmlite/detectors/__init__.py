"""Detectors with a Lite encoder, and H-Deformable-DETR, in mmdet's registry."""

from .h_deformable_detr import HDeformableDETR
from .h_deformable_detr_head import HDeformableDETRHead

__all__ = ['HDeformableDETR', 'HDeformableDETRHead']
