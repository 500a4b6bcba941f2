"""Models of any framework: parts found by their structure, changes that can be undone."""

from .attention import (
    Fused,
    fuse,
    is_deformable_attention,
    level_sizes,
    remember_level_sizes,
)
from .changes import Change, changing, restore
from .encoder import (
    EncoderLayerParts,
    StockLiteEncoder,
    copy_counterparts,
    stock_layers,
    use_schedule,
)
from .lite import to_lite

__all__ = [
    'Change',
    'EncoderLayerParts',
    'Fused',
    'StockLiteEncoder',
    'changing',
    'copy_counterparts',
    'fuse',
    'is_deformable_attention',
    'level_sizes',
    'remember_level_sizes',
    'restore',
    'stock_layers',
    'to_lite',
    'use_schedule',
]
