"""MMDetection and its kin. Importing this package loads none of them."""

from .register import require

__all__ = ['require']
