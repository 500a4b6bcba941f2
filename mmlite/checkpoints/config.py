"""From a Lite detector's config to the stock detector's behind it."""

from __future__ import annotations

import copy

from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from ..detectors import LiteDetectorMixin


def stock_config(model_config: ConfigDict) -> ConfigDict:
    """The stock detector's config behind a Lite detector's.

    Raises:
        ValueError: If the config is not of a Lite detector.
    """
    config = copy.deepcopy(model_config)
    lite = MODELS.get(config.type)
    if lite is None or not issubclass(lite, LiteDetectorMixin):
        raise ValueError(
            f'{config.type} is no Lite detector; a warm start needs the config of the Lite model '
            'that is to be trained'
        )
    stock = next(cls for cls in lite.__mro__ if not issubclass(cls, LiteDetectorMixin))
    config.type = stock.__name__
    known = ('num_layers', 'layer_cfg', 'init_cfg')
    config.encoder = {name: value for name, value in config.encoder.items() if name in known}
    config.decoder.pop('key_aware', None)
    # Building a detector writes these into its config, and building another refuses to find them.
    for part, names in (
        ('bbox_head', ('share_pred_layer', 'num_pred_layer', 'as_two_stage')),
        ('dn_cfg', ('num_classes', 'embed_dims', 'num_matching_queries')),
    ):
        for name in names:
            config.get(part, {}).pop(name, None)
    for layer_cfg, attention in (
        (config.encoder['layer_cfg'], 'self_attn_cfg'),
        (config.decoder['layer_cfg'], 'cross_attn_cfg'),
    ):
        for name in ('proj_key', 'same_loc'):
            (layer_cfg.get(attention) or {}).pop(name, None)
    return config
