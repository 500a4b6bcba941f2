"""Lite Deformable DETR."""

from __future__ import annotations

from mmdet.models.detectors import DeformableDETR
from mmdet.registry import MODELS

from .lite import LiteDetectorMixin


@MODELS.register_module()
class LiteDeformableDETR(LiteDetectorMixin, DeformableDETR):
    """Deformable DETR, plain, refining or two-stage, with the interleaved encoder.

    Arguments are those of MMDetection's ``DeformableDETR`` and of :class:`LiteDetectorMixin`.
    """
