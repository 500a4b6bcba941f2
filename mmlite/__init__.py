"""mmlite: Lite DETR encoders and fast key-aware deformable attention for MMDetection."""

__version__ = '0.1.0'
