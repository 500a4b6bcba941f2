"""Hugging Face transformers: models on our operators, and with the Lite encoder.

model = DeformableDetrForObjectDetection.from_pretrained('SenseTime/deformable-detr')
mmlite.fuse(model)                     # the same numbers, faster
mmlite.to_lite(model, 'H3L1-(2+1)x3')  # another encoder, to be trained
"""

from .attention import fuse
from .encoder import load_lite, to_lite

__all__ = ['fuse', 'load_lite', 'to_lite']
