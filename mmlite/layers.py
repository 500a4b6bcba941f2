"""The layers of :mod:`mmlite.openmmlab`, under the name that version 0.1.0 gave them."""

from .openmmlab.layers import *  # noqa: F403
from .openmmlab.layers import __all__ as __all__
