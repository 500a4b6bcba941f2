"""OpenMMLab's packages: everything that ``import mmlite`` adds to them is in :func:`register`."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from .startup import when_imported

# Import name -> the distributions that provide it and the versions of each that fit: what to
# install of OpenMMLab's packages first, their maintained continuation last.
_STACK = {
    'mmengine': {'mmengine': '>=0.10,<1', 'onedl-mmengine': '>=0.10,<1'},
    'mmcv': {'mmcv-lite': '>=2.0.0,<2.2', 'mmcv': '>=2.0.0,<2.2', 'onedl-mmcv': '>=2.3,<3'},
    'mmdet': {'mmdet': '>=3.3,<3.4', 'onedl-mmdetection': '>=3.5,<3.6'},
}

# The continuation's MMEngine cannot be imported beside an earlier PyTorch.
_CONTINUATION_TORCH = '>=2.3'

# A module of the stack -> ours that builds on it and is imported right after it. MMDetection's
# registries import theirs when they are first asked for a component.
_FOLLOWERS = {
    'mmengine.registry': ('mmlite.openmmlab.by_structure',),
    'mmdet.models': (
        'mmlite.openmmlab.backbones',
        'mmlite.openmmlab.layers',
        'mmlite.openmmlab.detectors',
        'mmlite.openmmlab.distillation',
    ),
    'mmengine.analysis': ('mmlite.openmmlab.flops',),  # for get_flops
    'mmdet.datasets': ('mmlite.datasets.coco', 'mmlite.datasets.files'),
    'mmengine.runner': ('mmlite.openmmlab.runner',),
}

# Hook -> where it is imported from when a config builds it.
_HOOKS = {
    'FusedAttentionHook': 'mmlite.openmmlab.layers',
    'WarmStartHook': 'mmlite.openmmlab.checkpoints.hooks',
    'DistillHook': 'mmlite.openmmlab.checkpoints.hooks',
    'SafeCheckpointHook': 'mmlite.openmmlab.checkpoints.hooks',
    'EfficiencyHook': 'mmlite.analysis.hooks',
    'AttentionMapHook': 'mmlite.analysis.hooks',
    'OptimizeHook': 'mmlite.export.inference',
}


def register() -> None:
    """Add mmlite to MMDetection and mmengine, to each of their modules when it is imported.

    Hooks are registered by name, and imported when a config builds one. mmengine's loader of local
    checkpoints becomes the one that runs no code from them.

    Where a package of the stack is missing or does not fit, nothing is added. In the second case a
    warning says what to install, and a config that asks for one of our detectors ends with that
    sentence. The operators work in any case.
    """
    missing, unfit = _check_stack()
    if unfit:
        warnings.warn(_advice(unfit), stacklevel=3)
        when_imported('mmdet.registry', _refuse_detectors)
    elif not missing:
        for module in _FOLLOWERS:
            when_imported(module, _import_followers)
        when_imported('mmdet.registry', _add_hooks)
        when_imported('mmengine.runner.checkpoint', _add_loader)


def fits() -> bool:
    """Whether MMDetection and what it needs are there, in versions that fit."""
    return not any(_check_stack())


def require() -> None:
    """Check that MMDetection and what it needs are there.

    Raises:
        ImportError: A package is missing or its version does not fit; the text says what to
            install.
    """
    missing, unfit = _check_stack()
    if missing or unfit:
        raise ImportError(_advice(missing + unfit))


def _import_followers(module: ModuleType) -> None:
    for follower in _FOLLOWERS[module.__name__]:
        importlib.import_module(follower)


def _add_hooks(registry: ModuleType) -> None:
    def build(name: str, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(_HOOKS[name]), name)(*args, **kwargs)

    for name in _HOOKS:
        registry.HOOKS.register_module(name=name, module=partial(build, name))


def _add_loader(checkpoint: ModuleType) -> None:
    # mmengine's log shows the part of the name after ``load_from_``.
    def load_from_local(filename: str, map_location: Any = None) -> Any:
        from .checkpoints.loading import load_checkpoint

        return load_checkpoint(filename, map_location)

    checkpoint.CheckpointLoader.register_scheme('', load_from_local, force=True)


def _refuse_detectors(registry: ModuleType) -> None:
    from .families import FAMILIES

    def refuse(*args: Any, **kwargs: Any) -> None:
        require()

    registry.MODELS.register_module(name=[family.lite for family in FAMILIES], module=refuse)


def _check_stack() -> tuple[list[str], list[str]]:
    """The packages that are missing, and those whose version does not fit, in words."""
    missing, unfit = [], []
    for package, distributions in _STACK.items():
        installed = {name: found for name in distributions if (found := _version(name))}
        if not installed:
            missing.append(f'{package} is not installed')
        elif not any(_fits(found, distributions[name]) for name, found in installed.items()):
            unfit.append(' and '.join(f'{name} is {found}' for name, found in installed.items()))
        if 'onedl-mmengine' in installed and not _fits(version('torch'), _CONTINUATION_TORCH):
            unfit.append(f'torch is {version("torch")}')
    return missing, unfit


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _fits(found: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(found, prereleases=True)


def _advice(problems: list[str]) -> str:
    openmmlab, continuation = (
        ' '.join("'{}{}'".format(*list(known.items())[i]) for known in _STACK.values())
        for i in (0, -1)
    )
    return (
        f'mmlite does not fit the installed MMDetection ({", ".join(problems)}): uninstall what '
        f"does not fit, then install either OpenMMLab's packages (pip install {openmmlab}) or "
        f"their maintained continuation (pip install 'torch{_CONTINUATION_TORCH}' {continuation})"
    )
