"""mmlite: Lite DETR encoders and fast key-aware deformable attention for MMDetection."""

from .integration import join

__version__ = '0.1.0'

join()
