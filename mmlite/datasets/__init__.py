"""Data sets: the checked COCO format, and the drawn shapes of the demo and the tests."""

from .coco import CheckedCocoDataset
from .shapes import CLASSES, generate_shapes

__all__ = ['CLASSES', 'CheckedCocoDataset', 'generate_shapes']
