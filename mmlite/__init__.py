"""mmlite: Lite DETR encoders and fast key-aware deformable attention for MMDetection.

Importing it loads nothing but the standard library. What it adds to MMDetection, it adds in
:func:`mmlite.openmmlab.register.register`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .openmmlab.register import register

if TYPE_CHECKING:
    import torch

    from .export.optimize import Optimized

__version__ = '0.1.0'


def optimize(model: torch.nn.Module) -> Optimized:
    """Make a detector's predictions faster; see :func:`mmlite.export.optimize.optimize`."""
    from .export.optimize import optimize

    return optimize(model)


def to_lite(model: torch.nn.Module, schedule: str, **options: Any) -> torch.nn.Module:
    """Make a built stock model Lite; see :func:`mmlite.openmmlab.to_lite.to_lite`."""
    from .openmmlab.to_lite import to_lite

    return to_lite(model, schedule, **options)


register()
