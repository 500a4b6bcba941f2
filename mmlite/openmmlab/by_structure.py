"""``type='ToLite'``: in a config of any OpenMMLab package, what ``mmlite.to_lite`` is in Python."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from mmengine.registry import MODELS

if TYPE_CHECKING:
    from torch import nn


@MODELS.register_module(name='ToLite')
def build_lite(stock: str | type, lite: dict[str, Any], **config: Any) -> nn.Module:
    """Build a stock model and give it the Lite encoder, for models without a Lite class.

    Nothing else of the stock config changes, and every registry that has mmengine's knows it::

        model = dict(type='ToLite', stock='CoDETR', lite=dict(schedule='H4L1-(2+1)x3'))

    Args:
        stock (str | type): The ``type`` of the stock config.
        lite (dict): Arguments of :func:`mmlite.models.to_lite`.
        **config: What else the stock config says of the model.

    Returns:
        nn.Module: The stock model with the Lite encoder; no hook could change it in time for the
        optimizer, which the runner builds before its hooks run.

    Raises:
        ValueError: The model has no encoder to replace, or the schedule does not fit it.
    """
    from ..models import to_lite  # late: it loads torch

    model = to_lite(MODELS.build({'type': stock, **config}), **lite)
    model.init_weights = partial(_initialise, model, lite)
    return model


def _initialise(model: nn.Module, lite: dict[str, Any]) -> None:
    """Initialise as the stock model does, whose code knows the attention of its own encoder."""
    from ..models import restore, to_lite

    fresh = restore(copy.deepcopy(model))
    type(fresh).init_weights(fresh)
    model.load_state_dict(to_lite(fresh, **lite).state_dict())
