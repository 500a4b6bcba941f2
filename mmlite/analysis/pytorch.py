"""Any PyTorch model as a contestant: as it is, on our operators, and with the Lite encoder."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from .. import fuse, to_lite
from ..models.encoder import EncoderLayerParts
from ..openmmlab.lite_config import schedules_for
from .contestants import FUSED, Inputs, Model
from .timing import Setting


def load_function(reference: str) -> Callable[[], tuple[nn.Module, Inputs]]:
    """The function that ``FILE.py:FUNCTION`` names; its folder joins Python's path.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be imported, has no such function, or that needs arguments.
    """
    file, _, name = reference.rpartition(':')
    path = Path(file)
    if path.suffix != '.py':
        raise ValueError(f'{reference!r} names no function; write FILE.py:FUNCTION')
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of a stranger's code
        raise ValueError(f'{path} cannot be imported: {type(error).__name__}: {error}') from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f'{path} has no function {name}')
    function = getattr(module, name)
    if not accepts(function):
        raise ValueError(f'{name} in {path} needs arguments; write a function that takes none')
    return function


def accepts(function: Callable, *arguments: object) -> bool:
    """Whether a function can be called so."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def variants(
    name: str,
    build: Callable[[], tuple[nn.Module, Inputs]],
    schedules: Sequence[str],
    setting: Setting,
) -> list[Model]:
    """The model that ``build`` returns with its inputs, the same fused, and fused Lite ones.

    Without ``schedules`` there is one Lite model, of the main schedule that fits the encoder, where
    there is one to replace.

    Raises:
        ValueError: ``build`` returns something else, a model that has nothing to fuse or does not
            take the batch size, or a schedule does not fit.
    """
    torch.manual_seed(0)
    found = build()
    kinds = [type(each) for each in found] if isinstance(found, tuple) else [type(found)]
    fits = len(kinds) == 2 and isinstance(found[0], nn.Module)
    if not fits or not (callable(found[1]) or isinstance(found[1], (tuple, dict))):
        raise ValueError(
            f'{name} must return (model, inputs): a module, and a tuple or dict of what it is '
            f'called with; it returned {", ".join(kind.__name__ for kind in kinds)}'
        )
    model, inputs = found
    if not callable(inputs) and setting.batch_sizes != (1,):
        raise ValueError(
            f'{name} returns inputs of one size: leave out --batch-size, or return a function of '
            'an image size and a batch size in their place'
        )
    if callable(inputs) and not accepts(inputs, (1, 1), 1):
        raise ValueError(f'the function of {name} must take an image size and a batch size')
    at, fitting = find_encoder(model)
    stock = Model(name, model.eval().to(setting.device), at, inputs)
    group = [stock, stock.in_mode(FUSED)]
    for schedule in schedules or fitting[:1]:
        try:
            lite = fuse(to_lite(copy.deepcopy(model), schedule))
        except ValueError as error:
            if schedules:
                raise
            stock.note = f'Not measured: {name}, Lite: {error}.'
        else:
            group.append(Model(f'{name}, Lite {schedule}', lite, at, inputs))
    return group


def find_encoder(model: nn.Module) -> tuple[str | None, list[str]]:
    """The name of a model's first deformable encoder, and the schedules that fit it."""
    for name, part in model.named_modules():
        layers = getattr(part, 'layers', None)
        if name and isinstance(layers, nn.ModuleList) and len(layers):
            with suppress(ValueError):  # layers of another kind
                levels = EncoderLayerParts.of(layers[0]).shape[2]
                return name, schedules_for(levels, len(layers))
    return None, []
