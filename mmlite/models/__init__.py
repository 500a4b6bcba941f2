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
    StockLiteEncoder,
    copy_counterparts,
    encode_with_text,
    use_schedule,
)
from .lite import replace_encoders, to_lite

__all__ = [
    'Change',
    'Fused',
    'StockLiteEncoder',
    'changing',
    'copy_counterparts',
    'encode_with_text',
    'fuse',
    'is_deformable_attention',
    'level_sizes',
    'remember_level_sizes',
    'replace_encoders',
    'restore',
    'to_lite',
    'use_schedule',
]
