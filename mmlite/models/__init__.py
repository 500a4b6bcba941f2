"""Models of any framework: parts found by their structure, changes that can be undone."""

from .changes import Change, changing, restore
from .encoder import (
    EncoderLayerParts,
    copy_counterparts,
    is_deformable_attention,
    stock_layers,
    use_schedule,
)

__all__ = [
    'Change',
    'EncoderLayerParts',
    'changing',
    'copy_counterparts',
    'is_deformable_attention',
    'restore',
    'stock_layers',
    'use_schedule',
]
