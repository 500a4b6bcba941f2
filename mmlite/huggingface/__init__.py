"""Hugging Face transformers: models on our operators, and with the Lite encoder.

A built model is changed in place. What :func:`fuse_attention` does can be undone::

    from mmlite.huggingface import fuse_attention, to_lite

    model = DeformableDetrForObjectDetection.from_pretrained('SenseTime/deformable-detr')
    fuse_attention(model)              # the same numbers, faster
    to_lite(model, 'H3L1-(2+1)x3')     # another encoder, to be trained
"""

from .attention import fuse_attention, restore_attention
from .encoder import load_lite, to_lite

__all__ = ['fuse_attention', 'load_lite', 'restore_attention', 'to_lite']
