"""Acting on a module when somebody imports it, and not before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Call ``action`` with a module: at once if it is imported, otherwise right after it will be.

    Args:
        name (str): The module's full name.
        action (Callable): What to do with it. The importer sees the exceptions that it raises.
    """
    if name in sys.modules:
        action(sys.modules[name])
        return
    if _WAITING not in sys.meta_path:
        sys.meta_path.insert(0, _WAITING)
    _WAITING.actions.setdefault(name, []).append(action)


class _Waiting(MetaPathFinder):
    """Leaves finding a module to the other finders, and adds the actions to its execution."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                for action in self.actions[name]:
                    action(module)

            spec.loader.exec_module = execute_and_act
        return spec


_WAITING = _Waiting()
