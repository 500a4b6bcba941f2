"""Data sets: the checked COCO format, and the drawn shapes of the demo and the tests."""

from .shapes import CLASSES, STYLES, Style, generate_shapes

__all__ = ['CLASSES', 'STYLES', 'Style', 'generate_shapes']
