"""Data sets: the checked COCO format, and the drawn shapes of the demo and the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shapes import CLASSES, SHAPES, Style, generate_panoptic, generate_shapes

if TYPE_CHECKING:
    from .coco import CheckedCocoDataset

__all__ = [
    'CLASSES',
    'STYLES',
    'CheckedCocoDataset',
    'Style',
    'generate_panoptic',
    'generate_shapes',
]

# What can be drawn, by name.
STYLES = {'shapes': SHAPES}


def __getattr__(name: str) -> type:
    """Load MMDetection for its data set alone: the rest is used by processes that start often."""
    if name == 'CheckedCocoDataset':
        from .coco import CheckedCocoDataset

        return CheckedCocoDataset
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
