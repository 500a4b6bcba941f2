"""mmlite: Lite DETR encoders and fast key-aware deformable attention.

The verbs below change a model of MMDetection, Hugging Face transformers or any PyTorch repository
in place and return it; :func:`load` gives a detector that finds objects in images.
Importing mmlite loads nothing but the standard library. What it adds to MMDetection, it adds in
:func:`mmlite.openmmlab.register.register`.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .openmmlab.register import fits, register

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from .export import Detector

__version__ = '0.1.0'
__all__ = ['fuse', 'load', 'optimize', 'restore', 'to_lite', 'use_schedule']


def load(
    model: str | PathLike,
    checkpoint: str | None = None,
    *,
    device: str = 'cpu',
    threads: int | None = None,
    precision: str = 'float32',
    changes: dict[str, Any] | None = None,
) -> Detector:
    """Load a detector that finds objects in images, in PyTorch or as it was exported.

    Args:
        model (str | PathLike): A config of MMDetection with a deformable encoder, or the folder of
            an export, which needs no torch.
        checkpoint (str, optional): The config's weights; they may also follow it after a comma.
        device (str): Of a config: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``.
        threads (int, optional): CPU threads; in PyTorch of the whole process.
        precision (str): Of an export: see :func:`mmlite.export.load`.
        changes (dict, optional): To the config, such as ``{'model.num_queries': 300}``.

    Returns:
        Detector: ``detect(image)`` takes a file, or BGR pixels as ``cv2.imread`` gives them.

    Raises:
        OSError, ImportError, ValueError: Something is not there or does not fit.
    """
    if Path(model).is_dir():
        from .export import load

        if checkpoint or changes or device != 'cpu':
            raise ValueError(f'{model} is an export: it takes no checkpoint, changes or device')
        return load(model, threads, precision)
    if precision != 'float32':
        raise ValueError(f'precision {precision!r} is for exports; a config runs in float32')
    config = str(model).partition(',')[0]
    if '::' not in config and not Path(config).exists():
        what = 'give a config and its checkpoint, or the folder of an export'
        raise FileNotFoundError(f'{config} does not exist: {what}')
    if not config.endswith('.py') and Path(config).with_name('detector.json').is_file():
        raise ValueError(f'{config} is a file of an export: give its folder')
    from .openmmlab import require

    require()
    from .export.pytorch import load_pytorch

    return load_pytorch(str(model), checkpoint, device, threads, changes)


def to_lite(model: torch.nn.Module, schedule: str, **options: Any) -> torch.nn.Module:
    """Give a built stock model the Lite encoder, with all weights that have a counterpart.

    Query projections of key-aware attention and small FFNs are new: train them.

    Args:
        model (torch.nn.Module): For example a DINO or a Mask2Former; changed in place. What is of
            neither framework is read by its structure and tried (:mod:`mmlite.models`).
        schedule (str): For example ``'H3L1-(2+1)x3'``.
        **options: ``key_aware``, ``small_ffn``, ``update``, ``num_cp`` and what else the encoder
            takes: :class:`mmlite.openmmlab.layers.LiteEncoder`, for other models
            :class:`mmlite.models.StockLiteEncoder`.

    Returns:
        torch.nn.Module: The same model; :func:`restore` undoes the change.

    Raises:
        ValueError: The model has no encoder to replace or a Lite one already, or the schedule
            does not fit it. The model is unchanged then.
    """
    return _room(model).to_lite(model, schedule, **options)


def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Run standard deformable attention on :mod:`mmlite.ops`: same numbers, trainable.

    Args:
        model (torch.nn.Module): Changed in place.

    Returns:
        torch.nn.Module: The same model; :func:`restore` undoes the change.

    Raises:
        ValueError: The model has no deformable attention that mmlite can serve; it says why.
    """
    return _room(model).fuse(model)


def optimize(model: torch.nn.Module) -> torch.nn.Module:
    """Make a detector of MMDetection predict faster; see :func:`mmlite.export.optimize`.

    Returns:
        torch.nn.Module: The same model, for inference only; :func:`restore` undoes the change.

    Raises:
        ValueError: The model is none of those that can be optimised.
    """
    from .export.inference import optimize

    return optimize(model)


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo what the other verbs have done to a model, the last change first.

    Weights that were trained in between and are not part of the stock model are lost.
    """
    from .models import restore

    return restore(model)


def use_schedule(model: torch.nn.Module, schedule: str) -> torch.nn.Module:
    """Choose one of the schedules that an elastic Lite encoder was trained with.

    Args:
        model (torch.nn.Module): With a Lite encoder that was given ``elastic``.
        schedule (str): For example ``'H2L2-(2+1)x3'``.

    Returns:
        torch.nn.Module: The same model.

    Raises:
        ValueError: The model has no Lite encoder, or no weights for this schedule.
    """
    from .models import use_schedule

    return use_schedule(model, schedule)


def _room(model: torch.nn.Module) -> ModuleType:
    """The package that knows a model, by where the classes of its modules come from."""
    import torch

    from . import models

    if not isinstance(model, torch.nn.Module):  # many functions return it with a criterion
        raise ValueError(f'give a torch.nn.Module alone, not a {type(model).__name__}')
    every = [*model.modules()]
    if 'mmdet' in _packages(every) and fits():
        from .openmmlab import verbs

        return verbs
    # The authors' Grounding DINO has transformers' BERT, but an attention of its own.
    attentions = [part for part in every if models.is_deformable_attention(part)]
    if 'transformers' in _packages(attentions or every):
        from . import huggingface

        return huggingface
    return models


def _packages(modules: list[torch.nn.Module]) -> set[str]:
    classes = {base for module in modules for base in type(module).__mro__}
    return {cls.__module__.partition('.')[0] for cls in classes}


register()
