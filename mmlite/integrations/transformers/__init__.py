"""Hugging Face transformers: models on :mod:`mmlite.ops`.

A built model is changed in place, and can be changed back::

    from mmlite.integrations.transformers import fuse_attention, restore_attention

    model = DeformableDetrForObjectDetection.from_pretrained('SenseTime/deformable-detr')
    fuse_attention(model)
"""

from .attention import fuse_attention, restore_attention

__all__ = ['fuse_attention', 'restore_attention']
