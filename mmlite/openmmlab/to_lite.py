"""A built stock model becomes its Lite variant."""

from __future__ import annotations

import copy
from typing import Any

from mmdet.registry import MODELS
from torch import nn

from ..nn import EncoderSchedule
from .checkpoints.warm_start import copy_counterparts
from .families import FAMILIES, encoder_name, family_of, find_holder, is_lite
from .lite_config import forget_building, lite_change


def to_lite(model: nn.Module, schedule: str | EncoderSchedule, **options: Any) -> nn.Module:
    """Turn a built model of MMDetection into its Lite variant.

    What has a counterpart is copied; key-aware query projections and small FFNs start at random.
    Training goes on from there; :func:`warm_start` fits them to images first.

    Args:
        model (nn.Module): A stock model, such as a DINO or a Mask2Former. It is left as it is.
        schedule (str | EncoderSchedule): For example ``'H3L1-(2+1)x3'``.
        **options: Further arguments of :class:`mmlite.openmmlab.layers.LiteEncoder`, such as
            ``key_aware=False``.

    Returns:
        nn.Module: A new model, with the ``cfg`` of the old one, changed alike, where it had one.

    Raises:
        ValueError: The model has no encoder to replace, is Lite already, or the schedule does not
            fit it.
    """
    name = encoder_name(model)
    holder_name = name.rpartition('.')[0]
    lite = copy.deepcopy(model)
    holder, stock = lite.get_submodule(holder_name), lite.get_submodule(name)
    family = family_of(holder, subclasses=False)
    if family is None or is_lite(holder):
        kind = type(holder).__name__
        already = f'{kind} is Lite already' if is_lite(holder) else f'{kind} has no Lite variant'
        raise ValueError(
            f'{already}; to_lite takes a stock {", ".join(family.stock for family in FAMILIES)}'
        )

    arguments = {'num_layers': stock.num_layers, 'layer_cfg': stock.layer_cfg}
    if stock.num_cp > 0:
        arguments['num_cp'] = stock.num_cp
    for further in ('text_layer_cfg', 'fusion_layer_cfg'):
        if hasattr(stock, further):
            arguments[further] = getattr(stock, further)
    lite_class = MODELS.get(family.lite)
    encoder = lite_class.encoder_class(schedule=schedule, **{**arguments, **options})
    holder.__class__ = lite_class
    holder.encoder = encoder.to(next(stock.parameters()).device).train(stock.training)
    copy_counterparts(lite, model)
    if 'model' in (getattr(lite, 'cfg', None) or {}):
        change = lite_change(model.cfg.model, schedule)
        find_holder(change)[1]['encoder'].update(options)
        lite.cfg.merge_from_dict({'model': change})
        forget_building(lite.cfg.model)
    return lite
