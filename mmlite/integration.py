"""What importing mmlite adds to an MMDetection that is installed beside it."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

# Import name -> the distributions that provide it and the versions of each that fit: the
# OpenMMLab packages first, then their maintained continuation.
_STACK = {
    'mmengine': {'mmengine': '>=0.10,<1', 'onedl-mmengine': '>=0.10,<1'},
    'mmcv': {'mmcv': '>=2.0.0,<2.2', 'onedl-mmcv': '>=2.3,<3'},
    'mmdet': {'mmdet': '>=3.3,<3.4', 'onedl-mmdetection': '>=3.5,<3.6'},
}

# MMDetection's registry -> our modules that register something in it.
_REGISTERED = {
    'MODELS': (
        'mmlite.layers',
        'mmlite.detectors',
        'mmlite.checkpoints.loading',
        'mmlite.analysis.complexity',  # what mmdet's get_flops has to know about our operators
    ),
    'DATASETS': ('mmlite.datasets',),
    'HOOKS': ('mmlite.layers.stock', 'mmlite.checkpoints.hooks', 'mmlite.analysis.hooks'),
}


def join() -> None:
    """Register mmlite with MMDetection, where MMDetection is installed.

    Our modules become *locations* of MMDetection's registries, so they are imported when the
    first component is built and ``import mmlite`` stays light. Configs of the installed package
    can then be named ``mmlite::folder/config.py``.

    Raises:
        ImportError: A package of the stack is installed in a version that does not fit.
    """
    missing, unfit = _check_stack()
    if unfit:
        raise ImportError(_advice(unfit))
    if missing:
        return  # the operators work without MMDetection

    from mmdet import registry
    from mmengine.config.utils import MODULE2PACKAGE

    for name, modules in _REGISTERED.items():
        registry_of_kind = getattr(registry, name)
        if registry_of_kind._imported:  # its locations have been visited and will not be again
            for module in modules:
                importlib.import_module(module)
        else:
            registry_of_kind._locations.extend(modules)
    MODULE2PACKAGE['mmlite'] = 'mmlite'


def require() -> None:
    """Check that MMDetection and what it needs are there.

    Raises:
        ImportError: A package is missing or its version does not fit; the text says what to
            install.
    """
    missing, unfit = _check_stack()
    if missing or unfit:
        raise ImportError(_advice(missing + unfit))


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
    return missing, unfit


def _fits(found: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(found, prereleases=True)


def _advice(problems: list[str]) -> str:
    families = zip(*(bounds.items() for bounds in _STACK.values()))
    openmmlab, continuation = (
        ' '.join(f"'{name}{bounds}'" for name, bounds in family) for family in families
    )
    return (
        f'mmlite does not fit the installed MMDetection ({", ".join(problems)}): install either '
        f"OpenMMLab's packages (mim install {openmmlab}) or their maintained continuation "
        f'(pip install {continuation})'
    )
