"""OpenMMLab's packages: everything that ``import mmlite`` adds to them is in :func:`register`."""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from .startup import add_configs, when_imported

# Import name -> the distributions that provide it and the versions of each that fit: what to
# install of OpenMMLab's packages first, their maintained continuation last.
_STACK = {
    'mmengine': {'mmengine': '>=0.10,<1', 'onedl-mmengine': '>=0.10,<1'},
    'mmcv': {'mmcv-lite': '>=2.0.0,<2.2', 'mmcv': '>=2.0.0,<2.2', 'onedl-mmcv': '>=2.3,<3'},
    'mmdet': {'mmdet': '>=3.3,<3.4', 'onedl-mmdetection': '>=3.5,<3.6'},
}

# The continuation's MMEngine cannot be imported beside an earlier PyTorch.
_CONTINUATION_TORCH = '>=2.3'

# MMDetection's registry -> our modules that register something in it.
_REGISTERED = {
    'MODELS': (
        'mmlite.openmmlab.layers',
        'mmlite.openmmlab.detectors',
        'mmlite.analysis.complexity',  # what mmdet's get_flops has to know about our operators
    ),
    'DATASETS': ('mmlite.datasets.coco',),
    'HOOKS': (
        'mmlite.openmmlab.layers.stock',
        'mmlite.openmmlab.checkpoints.hooks',
        'mmlite.openmmlab.checkpoints.saving',
        'mmlite.analysis.hooks',
        'mmlite.export.optimize',
    ),
}

# What a config asks mmlite for by name, and is refused where the stack does not fit.
_DETECTORS = (
    *('LiteDINO', 'LiteDeformableDETR', 'LiteHDeformableDETR', 'LiteDDQDETR'),
    *('LiteGroundingDINO', 'LiteMSDeformAttnPixelDecoder'),
)


def register() -> None:
    """Add mmlite to MMDetection and mmengine, to each of their modules when it is imported.

    - Our modules become *locations* of MMDetection's registries, so they are imported when the
      first component is built. No name that is taken is registered again.
    - Configs of the installed package can be named ``mmlite::folder/config.py``.
    - mmengine's loader of local checkpoints becomes the one that runs no code from them.

    Where a package of the stack is missing, nothing is added. Where one does not fit, nothing is
    added either, a warning says what to install, and a config that asks for one of our detectors
    ends with that sentence. The operators work in any case.
    """
    missing, unfit = _check_stack()
    if unfit:
        warnings.warn(_advice(unfit), stacklevel=3)
        when_imported('mmdet.registry', _refuse_detectors)
    elif not missing:
        when_imported('mmdet.registry', _add_locations)
        when_imported('mmengine.config.utils', add_configs)
        when_imported('mmengine.runner.checkpoint', _add_loader)


def require() -> None:
    """Check that MMDetection and what it needs are there.

    Raises:
        ImportError: A package is missing or its version does not fit; the text says what to
            install.
    """
    missing, unfit = _check_stack()
    if missing or unfit:
        raise ImportError(_advice(missing + unfit))


def _add_locations(registry: ModuleType) -> None:
    for name, modules in _REGISTERED.items():
        registry_of_kind = getattr(registry, name)
        if registry_of_kind._imported:  # its locations have been visited and will not be again
            for module in modules:
                importlib.import_module(module)
        else:
            registry_of_kind._locations.extend(modules)


def _add_loader(checkpoint: ModuleType) -> None:
    # mmengine's log shows the part of the name after ``load_from_``.
    def load_from_local(filename: str, map_location: Any = None) -> Any:
        from .checkpoints.loading import load_checkpoint

        return load_checkpoint(filename, map_location)

    checkpoint.CheckpointLoader.register_scheme('', load_from_local, force=True)


def _refuse_detectors(registry: ModuleType) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        require()

    registry.MODELS.register_module(name=list(_DETECTORS), module=refuse)


def _check_stack() -> tuple[list[str], list[str]]:
    """The packages that are missing, and those whose version does not fit, in words."""
    missing, unfit = [], []
    for package, distributions in _STACK.items():
        installed = {}
        for distribution in distributions:
            try:
                installed[distribution] = version(distribution)
            except PackageNotFoundError:
                continue
        if not installed:
            missing.append(f'{package} is not installed')
        elif not any(_fits(found, distributions[name]) for name, found in installed.items()):
            unfit.append(' and '.join(f'{name} is {found}' for name, found in installed.items()))
        if 'onedl-mmengine' in installed and not _fits(version('torch'), _CONTINUATION_TORCH):
            unfit.append(f'torch is {version("torch")}')
    return missing, unfit


def _fits(found: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(found, prereleases=True)


def _advice(problems: list[str]) -> str:
    openmmlab, continuation = (
        ' '.join(
            f"'{name}{bounds}'" for name, bounds in (list(d.items())[i] for d in _STACK.values())
        )
        for i in (0, -1)
    )
    return (
        f'mmlite does not fit the installed MMDetection ({", ".join(problems)}): uninstall what '
        f"does not fit, then install either OpenMMLab's packages (pip install {openmmlab}) or "
        f"their maintained continuation (pip install 'torch{_CONTINUATION_TORCH}' {continuation})"
    )
