"""The checkpoints of :mod:`mmlite.openmmlab`, under the name that version 0.1.0 gave them."""

from .openmmlab.checkpoints import *  # noqa: F403
from .openmmlab.checkpoints import __all__ as __all__
