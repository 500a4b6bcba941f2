"""Other people's frameworks, one a file. Importing this package loads none of them."""

from .register import require

__all__ = ['require']
