"""Changes to a model in place, with a record by which they are undone.

The record is a list in the model's ``__dict__``. It names modules by their paths, so copying and
pickling the model take it along, and ``state_dict`` and ``parameters`` do not see it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

_RECORD = '_mmlite_changes'
LOG = logging.getLogger('mmlite')


@dataclass
class Change:
    """What one verb has changed; made by :func:`changing`.

    Attributes:
        verb (str): Which one.
        entries (list): Path, attribute and what it was, in the order of the changes.
    """

    verb: str
    entries: list[tuple[str, str, list]] = field(default_factory=list)

    def set(self, model: nn.Module, path: str, name: str, new: Any) -> None:
        """Set an attribute, parameter, buffer or child of a submodule, or its ``__class__``.

        Args:
            model (nn.Module): The model.
            path (str): Name of the submodule, or of an object that it holds, such as ``config``.
            name (str): The attribute.
            new (Any): Its new value.
        """
        owner = _find(model, path)
        self.entries.append((path, name, _get(owner, name)))
        setattr(owner, name, new)

    def replace(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Put a module in the place of another, under each of its names."""
        for path, part in list(model.named_modules(remove_duplicate=False)):
            if part is old:
                parent, _, name = path.rpartition('.')
                self.set(model, parent, name, new)

    def undo(self, model: nn.Module) -> None:
        """Set everything back, the last change first."""
        while self.entries:
            path, name, old = self.entries.pop()
            owner = _find(model, path)
            if not old:
                delattr(owner, name)
                continue
            (now,) = _get(owner, name) or [None]
            _follow(old[0], now, model)
            setattr(owner, name, old[0])


def reasons(left: dict[str, str]) -> str:
    """Why modules, by their names, were left as they are; each reason once."""
    names = {why: [name for name in left if left[name] == why] for why in left.values()}
    return '; '.join(f'{", ".join(names[why])}: {why}' for why in names)


@contextmanager
def changing(model: nn.Module, verb: str) -> Iterator[Change]:
    """Change a model, all or nothing: an exception undoes what was done before it.

    Args:
        model (nn.Module): The model.
        verb (str): What is done to it, for the log.

    Yields:
        Change: Whose methods change the model.
    """
    change = Change(verb)
    try:
        yield change
    except BaseException:
        change.undo(model)
        raise
    if change.entries:
        model.__dict__.setdefault(_RECORD, []).append(change)


def restore(model: nn.Module, last: bool = False) -> nn.Module:
    """Undo the recorded changes of a model, the last one first.

    What was kept goes to the device and the dtype that the model has now.

    Args:
        model (nn.Module): A model, changed or not.
        last (bool): Undo the last change alone.

    Returns:
        nn.Module: The same model.
    """
    done: list[Change] = model.__dict__.get(_RECORD, [])
    verbs = []
    while done and not (last and verbs):
        verbs.append(done[-1].verb)
        done.pop().undo(model)
    if not done:
        model.__dict__.pop(_RECORD, None)
    what = f'undid {", ".join(verbs)}' if verbs else 'there was nothing to undo'
    LOG.info('restore: %s of %s', what, type(model).__name__)
    return model


def _find(model: nn.Module, path: str) -> Any:
    return attrgetter(path)(model) if path else model


def _get(owner: Any, name: str) -> list:
    """The object's own attribute in a list, which is empty where it has none."""
    if name == '__class__' or not isinstance(owner, nn.Module):
        return [getattr(owner, name)] if hasattr(owner, name) else []
    members = {**owner._parameters, **owner._buffers, **owner._modules, **owner.__dict__}
    return [members[name]] if name in members else []


@torch.no_grad()
def _follow(old: Any, now: Any, model: nn.Module) -> None:
    """Move what was kept to where the model is now, and into its mode."""
    like = next(now.parameters(), None) if isinstance(now, nn.Module) else now
    if not isinstance(like, Tensor):
        like = next(model.parameters(), None)
    if like is None:
        return
    if isinstance(old, nn.Module):
        mine = next(old.parameters(), like)
        if (like.device, like.dtype) != (mine.device, mine.dtype):
            old.to(like.device, like.dtype)
        if isinstance(now, nn.Module) and old.training != now.training:
            old.train(now.training)
    elif isinstance(old, Tensor) and old.is_floating_point():
        old.data = old.data.to(like.device, like.dtype)
