"""Deformable attention operators on plain PyTorch tensors.

This package needs torch alone and can be used outside MMDetection.
"""

from .functional import (
    BackendStatus,
    backends,
    key_aware_deform_attn,
    key_aware_deform_attn_from_offsets,
    ms_deform_attn,
    ms_deform_attn_from_offsets,
    use_backend,
)

__all__ = [
    'BackendStatus',
    'backends',
    'key_aware_deform_attn',
    'key_aware_deform_attn_from_offsets',
    'ms_deform_attn',
    'ms_deform_attn_from_offsets',
    'use_backend',
]
