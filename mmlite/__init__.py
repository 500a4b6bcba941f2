"""mmlite: Lite DETR encoders and fast key-aware deformable attention for MMDetection.

Importing it loads nothing but the standard library. What it adds to MMDetection, it adds in
:func:`mmlite.integrations.openmmlab.register`.
"""

from .integrations.openmmlab import register

__version__ = '0.1.0'

register()
