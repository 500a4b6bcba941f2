"""What :mod:`mmlite` does to a built model of MMDetection."""

from __future__ import annotations

import copy
import logging
from typing import Any

from mmdet.registry import MODELS
from torch import nn

from ..models import changing, copy_counterparts
from ..models import to_lite as to_lite_by_structure
from ..nn import EncoderSchedule
from .families import FAMILIES, encoder_name, family_of, find_holder, is_lite
from .layers import fuse
from .lite_config import STOCK_ENCODER, forget_building, lite_change

__all__ = ['fuse', 'to_lite']


def to_lite(model: nn.Module, schedule: str | EncoderSchedule, **options: Any) -> nn.Module:
    """Turn a built model of MMDetection into its Lite variant; see :func:`mmlite.to_lite`.

    A detector of a class that mmlite has no variant of is changed by its structure.

    Where the model has a ``cfg``, one with the same change takes its place. Training goes on from
    there; :func:`mmlite.openmmlab.checkpoints.warm_start` fits the new parts to images first.
    """
    if not any(family_of(part, subclasses=False) for part in model.modules()):
        return to_lite_by_structure(model, schedule, **options)
    name = encoder_name(model)
    holder_name = name.rpartition('.')[0]
    holder, stock = model.get_submodule(holder_name), model.get_submodule(name)
    family = family_of(holder, subclasses=False)
    if family is None or is_lite(holder):
        already = 'is Lite already' if is_lite(holder) else 'has no Lite variant'
        raise ValueError(
            f'{type(holder).__name__} {already}; to_lite takes a stock '
            f'{", ".join(family.stock for family in FAMILIES)}'
        )
    if any(not type(part).__module__.startswith('mmdet.') for part in (stock, *stock.layers)):
        return to_lite_by_structure(model, schedule, **options)

    if 'elastic' in options:  # as a config may hold it
        options['elastic'] = [*map(str, EncoderSchedule.parse_all(options['elastic']))]
    arguments = {name: getattr(stock, name) for name in STOCK_ENCODER if hasattr(stock, name)}
    if stock.num_cp > 0:
        arguments['num_cp'] = stock.num_cp
    lite_class = MODELS.get(family.lite)
    encoder = lite_class.encoder_class(schedule=schedule, **{**arguments, **options})
    copy_counterparts(encoder, stock)
    like = next(stock.parameters())
    encoder.to(like.device, like.dtype).train(stock.training)
    with changing(model, 'to_lite') as change:
        change.replace(model, stock, encoder)
        change.set(model, holder_name, '__class__', lite_class)
        if 'model' in (getattr(model, 'cfg', None) or {}):
            cfg = copy.deepcopy(model.cfg)
            changed = lite_change(cfg.model, schedule)
            find_holder(changed)[1]['encoder'].update(options)
            cfg.merge_from_dict({'model': changed})
            forget_building(cfg.model)
            change.set(model, '', 'cfg', cfg)
    logging.getLogger('mmlite').info(
        'to_lite: %s is %s with schedule %s; train what is new', family.stock, family.lite, schedule
    )
    return model
