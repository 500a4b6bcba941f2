"""Checkpoints are read without running code that they carry.

MMEngine's checkpoints hold more than tensors: logged losses as ``HistoryBuffer`` objects, the
state of schedulers, NumPy arrays and numbers. ``torch.load`` refuses them from torch 2.6 on, and
before that it ran whatever the file asked for. The loader here reads plain types alone, with every
torch. ``import mmlite`` puts it in the place of MMEngine's loader of local files, so that
``load_from``, ``resume`` and ``mim test`` use it.
"""

from __future__ import annotations

import codecs
import datetime
import os
import pathlib
import pickle
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

try:
    from numpy._core import multiarray
except ImportError:  # NumPy < 1.26
    from numpy.core import multiarray  # type: ignore[no-redef]

# From this version on, torch's own safe loading can be told about further types by name.
_TORCH_KNOWS_SAFE_GLOBALS = torch.__version__ >= (2, 6)

# Methods that MMEngine pickles as ``getattr(owner, name)``. The real getattr would open any door.
_METHODS = {
    HistoryBuffer: ('min', 'max', 'mean', 'current'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}
# Types that hold data and run nothing when they are made.
_PLAIN = (
    *(*_METHODS, np.ndarray, np.dtype, Counter, Namespace, set, frozenset, slice, complex),
    *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone),
    # Reading a dtype checks the class of the dtype object, one for each kind of number or text.
    *{
        type(np.dtype(code))
        for kind in ('AllInteger', 'AllFloat', 'Datetime')
        for code in np.typecodes[kind] + '?US'
    },
)


def load_checkpoint(
    path: str | os.PathLike, map_location: Any = 'cpu', allow: Iterable[Callable] = ()
) -> Any:
    """Read a checkpoint file of tensors, numbers, text and other plain data.

    Args:
        path (str | PathLike): File written by ``torch.save``.
        map_location: As for ``torch.load``. Defaults to the CPU.
        allow (Iterable[type]): Further classes to accept, from a source that you trust. Those
            given to ``torch.serialization.add_safe_globals`` are accepted, too.

    Returns:
        The object that was saved, for MMEngine's checkpoints a dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or is no checkpoint.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint file {path} does not exist')
    trusted = getattr(torch.serialization, 'get_safe_globals', list)()
    known = {**_KNOWN, **dict(map(_named, [*trusted, *allow]))}
    try:
        if not _TORCH_KNOWS_SAFE_GLOBALS:
            return _load_before_torch_2_6(path, map_location, known)
        with torch.serialization.safe_globals([(value, name) for name, value in known.items()]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle make the reader fail in many ways
        raise ValueError(f'{path} {_problem(error)}') from error


def _problem(error: Exception) -> str:
    text = str(error)
    refused = re.search(r"(?:GLOBAL |but got <class ')((?:([\w.]+)\.)?\w+)", text)
    if refused is None:
        # Torch speaks of weights_only before it comes to the reason.
        reason = text.rpartition('WeightsUnpickler error:')[2].strip().partition('\n')[0]
        reason = reason or type(error).__name__
        way_out = 'copy or download it again, or give the checkpoint behind its config'
        return f'is not a checkpoint that torch can read: {reason}; {way_out}'
    name, module = refused[1], refused[2] or 'builtins'
    if 'is blocked' in text:
        way_out = 'torch never loads this, so do not trust the file'
    elif hasattr(torch.serialization, 'add_safe_globals'):
        way_out = (
            'if you trust the file, run this before, or put it at the top of the config: '
            f'import torch, {module}; torch.serialization.add_safe_globals([{name}])'
        )
    else:  # torch < 2.4
        way_out = f'if you trust the file, read it with load_checkpoint(path, allow=[{name}])'
    return f'is refused: it holds {name}, which could run code when it is loaded; {way_out}'


def _named(entry: Any) -> tuple[str, Callable]:
    """The name that something is pickled under; torch lets a user give another with it."""
    value, *name = entry if isinstance(entry, tuple) else (entry,)
    return (*name, f'{value.__module__}.{value.__qualname__}')[0], value


def _method(owner: Any, name: str) -> Callable:
    if name not in _METHODS.get(owner, ()):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {owner!r} and {name!r}')
    return getattr(owner, name)


# What a checkpoint may name, by the names it is pickled under.
_KNOWN: dict[str, Callable] = {
    **dict(map(_named, _PLAIN)),
    'builtins.getattr': _method,
    '_codecs.encode': codecs.encode,  # the bytes of an array, in pickle's protocol 2
    # NumPy 2 moved its core, so a file may come from either side of the move.
    **{
        f'numpy.{core}.multiarray.{maker.__name__}': maker
        for core in ('core', '_core')
        for maker in (multiarray._reconstruct, multiarray.scalar)
    },
    # A path of another system cannot be made here, but its text can. Python 3.13 moved the classes.
    **{
        f'{module}.{pure}{system}Path': getattr(pathlib, f'Pure{system}Path')
        for module in ('pathlib', 'pathlib._local')
        for pure in ('', 'Pure')
        for system in ('Posix', 'Windows')
    },
}


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
