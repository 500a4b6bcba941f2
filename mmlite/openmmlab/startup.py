"""Act on a module at the moment it is imported.

The installed package has this file a second time, beside the package, and a ``.pth`` file that
calls :func:`at_startup` whenever Python starts. So it imports nothing that takes time.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own takes milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Action = Callable[[ModuleType], None]


def at_startup() -> None:
    """What has to be in place before anybody imports mmlite; nothing is imported for it.

    Before any ``custom_imports`` MMDetection's tools import ``mmcv.ops``, and mmengine resolves
    ``_base_ = 'mmlite::folder/config.py'``. The last finder in line answers for mmcv's compiled
    operators: it is asked only when there is no ``mmcv._ext``.
    """
    when_imported('mmengine.config.utils', add_configs)
    sys.meta_path.append(_StandIn)  # type: ignore[arg-type]


def add_configs(config_utils: ModuleType) -> None:
    """Add mmlite to the packages whose configs mmengine knows by name."""
    config_utils.MODULE2PACKAGE.setdefault('mmlite', 'mmlite')


def when_imported(name: str, action: Action) -> None:
    """Call ``action`` with a module: at once if it is imported, otherwise right after it will be.

    The importer sees the exceptions that it raises.
    """
    if name in sys.modules:
        action(sys.modules[name])
        return
    if _WAITING not in sys.meta_path:
        sys.meta_path.insert(0, _WAITING)
    _WAITING.actions.setdefault(name, []).append(action)


class _StandIn:
    """Finds ``mmcv._ext`` in mmlite, where no other finder has found it."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != 'mmcv._ext':
            return None
        from importlib.util import find_spec, spec_from_file_location

        # By its file: mmcv.ops is being imported, and mmlite would import it again.
        package = find_spec('mmlite')
        if package is None or package.origin is None:
            return None
        # Beside the package's own file: an editable installation has more folders than this one.
        folder = package.origin.removesuffix('__init__.py')
        return spec_from_file_location(name, f'{folder}openmmlab/mmcv_ext.py')


class _Waiting:
    """Lets later finders find a module, and runs the actions after it is executed."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        after = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (each.find_spec(name, path, target) for each in after)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                for action in self.actions[name]:
                    action(module)

            spec.loader.exec_module = execute_and_act
        return spec


_WAITING = _Waiting()
