"""Checkpoints are read without running code that they carry.

mmengine's checkpoints hold more than tensors: the logged losses as ``HistoryBuffer`` objects,
NumPy arrays and numbers. ``torch.load`` refuses them from torch 2.6 on, and before that it ran
whatever the file asked for. The loader here reads those types and no others, with every torch.
``import mmlite`` puts it in the place of mmengine's loader of local files, so that ``load_from``,
``resume`` and ``mim test`` use it.
"""

from __future__ import annotations

import codecs
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

try:
    from numpy._core import multiarray
except ImportError:  # NumPy < 1.26
    from numpy.core import multiarray  # type: ignore[no-redef]

# From this version on, torch's own safe loading can be told about further types by name.
_TORCH_KNOWS_SAFE_GLOBALS = torch.__version__ >= (2, 6)


def load_checkpoint(
    path: str | os.PathLike,
    map_location: Any = 'cpu',
    allow: Iterable[type] = (),
) -> Any:
    """Read a checkpoint file that may hold tensors and mmengine's and NumPy's plain types.

    Args:
        path (str | PathLike): File written by ``torch.save``.
        map_location: As for ``torch.load``. Defaults to the CPU.
        allow (Iterable[type]): Further classes to accept, from a source that you trust.

    Returns:
        The object that was saved, for mmengine's checkpoints a dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or is no checkpoint.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    known = {**_known_types(), **{f'{kind.__module__}.{kind.__qualname__}': kind for kind in allow}}
    load = _load if _TORCH_KNOWS_SAFE_GLOBALS else _load_before_torch_2_6
    try:
        return load(path, map_location, known)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle make the reader fail in many ways
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        if refused is None:
            reason = str(error).partition('\n')[0] or type(error).__name__
            raise ValueError(f'{path} is not a checkpoint that torch can read: {reason}') from error
        raise ValueError(
            f'{path} is refused: it holds {refused[1]}, which is neither a tensor nor one of '
            "mmengine's or NumPy's plain types and could run code when it is loaded"
        ) from error


def _known_types() -> dict[str, Callable]:
    """What a checkpoint of mmengine may name, by the names it is pickled under."""
    known = {
        'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
        # A HistoryBuffer pickles its statistics as getattr(HistoryBuffer, 'mean').
        'builtins.getattr': _history_statistic,
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': np.dtype,
        '_codecs.encode': codecs.encode,  # the bytes of an array, in pickle's protocol 2
        'collections.Counter': Counter,  # the milestones of a MultiStepLR
    }
    # NumPy 2 moved its core, so a file may come from either side of the move.
    for core in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        known[f'{core}._reconstruct'] = multiarray._reconstruct
        known[f'{core}.scalar'] = multiarray.scalar
    # Reading a dtype checks the class of the dtype object, one for each kind of number.
    for number in np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?':
        kind = type(np.dtype(number))
        known[f'{kind.__module__}.{kind.__name__}'] = kind
    return known


def _history_statistic(owner: Any, name: str) -> Callable:
    """The one use of ``getattr`` that a checkpoint needs; the real one would open any door."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'GLOBAL getattr of {owner!r} and {name!r}')
    return getattr(owner, name)


def _load(path: str, map_location: Any, known: dict[str, Callable]) -> Any:
    with torch.serialization.safe_globals([(value, name) for name, value in known.items()]):
        return torch.load(path, map_location=map_location, weights_only=True)


def _load_before_torch_2_6(path: str, map_location: Any, known: dict[str, Callable]) -> Any:
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed = {**_get_allowed_globals(), **known}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Callable:
            # Protocol 2, torch's default, still uses the names of Python 2.
            full_name = f'{"builtins" if module == "__builtin__" else module}.{name}'
            if full_name not in allowed:
                raise pickle.UnpicklingError(f'GLOBAL {full_name}')
            return allowed[full_name]

    restricted = SimpleNamespace(
        __name__='restricted pickle',
        Unpickler=Unpickler,
        load=lambda file, **options: Unpickler(file, **options).load(),
    )
    # weights_only would know torch's own types alone; the unpickler above takes its place.
    return torch.load(path, map_location=map_location, pickle_module=restricted, weights_only=False)
