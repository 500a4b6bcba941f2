"""The one home of stock and Lite configs: from either to the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ..nn import EncoderSchedule
from .families import find_holder, is_lite, num_levels_of

# Arguments of the stock encoder, which a Lite one has beside its own.
STOCK_ENCODER = ('num_layers', 'layer_cfg', 'init_cfg', 'text_layer_cfg', 'fusion_layer_cfg')


def _levels_and_layers(model_config: dict) -> tuple[int, int]:
    encoder = find_holder(model_config)[1]['encoder']
    return num_levels_of(encoder), encoder['num_layers']


def fitting_schedules(model_config: dict) -> list[str]:
    """The schedules of the paper's kinds that fit a stock model.

    Low-level are the one or two largest maps; a block has two high-level updates or more.

    Raises:
        ValueError: The model has no encoder to replace, or one of a single level or layer.
    """
    levels, layers = _levels_and_layers(model_config)
    if levels < 2:
        raise ValueError(
            'the encoder sees a single map; an interleaved encoder needs two or more '
            '(num_levels of its self_attn_cfg, num_outs of the neck)'
        )
    if layers < 2:
        raise ValueError('the encoder has a single layer; an interleaved encoder needs two or more')
    return schedules_for(levels, layers)


def schedules_for(levels: int, layers: int) -> list[str]:
    """The schedules of the paper's kinds for an encoder of so many levels and layers."""
    fitting = EncoderSchedule.fitting(levels, layers)
    return [str(s) for s in fitting if s.num_low_levels <= 2 <= s.high_updates]


def main_schedule(model_config: dict) -> str:
    """The first of :func:`fitting_schedules`: ``H3L1-(2+1)x3`` for four levels and six layers."""
    return fitting_schedules(model_config)[0]


def lite_change(model_config: dict, schedule: str | EncoderSchedule) -> dict:
    """What makes a stock model Lite: to be merged into ``model`` of its config.

    For example ``{'type': 'LiteDINO', 'encoder': {'schedule': 'H3L1-(2+1)x3'}}``.

    Raises:
        ValueError: The model has no encoder to replace, is Lite already, or the schedule does not
            fit it.
    """
    path, part, family = find_holder(model_config)
    if is_lite(part['type']):
        raise ValueError(
            f'{family.lite} is Lite already, with schedule {part["encoder"].get("schedule")}; '
            'give the stock config'
        )
    schedule = EncoderSchedule.parse(schedule)
    levels, layers = _levels_and_layers(model_config)
    schedule.check_fit(layers, levels)
    change: dict = {
        'type': _scoped(family.lite, part['type']),
        'encoder': {'schedule': str(schedule)},
    }
    for name in reversed(path):
        change = {name: change}
    return change


def lite_config(
    config: Config,
    base: str | Path,
    schedule: str | EncoderSchedule,
    changes: dict | None = None,
) -> str:
    """The text of a Lite config that inherits a stock one.

    Args:
        config (Config): The stock config, read.
        base (str | Path): What the text inherits: ``mmdet::folder/config.py``, or a path as seen
            from the file that the text is for.
        schedule (str | EncoderSchedule): For example ``'H3L1-(2+1)x3'``.
        changes (dict, optional): What else the text changes, by keys such as
            ``'model.num_queries'``.

    Raises:
        ValueError: See :func:`lite_change`; a change is of one entry of a list, which a config
            cannot inherit; or the stock config is in Python style and cannot be imported by its
            name.
    """
    for key in changes or {}:
        if any(part.isdecimal() for part in key.split('.')):
            raise ValueError(
                f'a config cannot inherit a list and change {key}; give the whole list'
            )
    entries = Config({'model': lite_change(config.model, schedule)})
    entries.merge_from_dict(changes or {})
    # A list of a config takes the place of its base's, so the base's imports are kept.
    imports = (config.get('custom_imports') or {}).get('imports', ())
    imports = [imports] if isinstance(imports, str) else imports
    imports = list(dict.fromkeys([*imports, 'mmlite']))
    is_python = bool(config.filename) and Config._is_lazy_import(str(config.filename))
    lines = [f'custom_imports = dict(imports={imports!r})\n']
    for name, entry in entries.items():
        # In Python style a change is merged by hand, and a type is a class.
        merged = is_python and isinstance(config.get(name), dict)
        lines.append(f'{name}.merge({_code(entry)})\n' if merged else f'{name} = {_code(entry)}\n')
    text = ''.join(lines)
    if not is_python:
        return f'_base_ = {str(base)!r}\n{text}'
    lite = find_holder(config.model)[2].lite
    return (
        'from mmengine.config import read_base\n\n'
        f'from mmlite.openmmlab.detectors import {lite}\n\n'
        f'with read_base():\n    from {_module(str(base))} import *\n\n'
        + text.replace(f'type={lite!r}', f'type={lite}')
    )


def backbone_change(model_config: dict, model_name: str, checkpoint: str = '') -> dict[str, Any]:
    """What gives a model a backbone of timm, and its neck and pixels what goes with it.

    With a checkpoint the backbone's first stages are frozen and its norms evaluated, as those of
    MMDetection's ResNets. The result is for ``changes`` of :func:`lite_config`.

    Raises:
        ImportError: timm cannot be imported.
        ValueError: timm has no such network, or it lacks a map that the neck takes.
    """
    from .backbones import import_timm

    timm = import_timm()
    readers = (
        name
        for name, part in model_config.items()
        if isinstance(part, dict) and isinstance(part.get('in_channels'), Sequence)
    )
    neck = next(readers, None)
    if neck is None:
        raise ValueError('no neck or head of the config lists in_channels, the maps that it takes')
    strides = [4, 8, 16, 32][-len(model_config[neck]['in_channels']) :]
    try:
        net = timm.create_model(model_name, features_only=True)
    except RuntimeError as error:
        raise ValueError(f'timm makes no feature maps of {model_name}: {error}') from error
    maps = {each['reduction']: each for each in net.feature_info.info}
    if not maps.keys() >= set(strides):
        raise ValueError(
            f'{model_name} has maps of strides {sorted(maps)}; the {neck} takes {strides}'
        )
    backbone: dict[str, Any] = dict(_delete_=True, type='TimmBackbone', model_name=model_name)
    backbone['out_indices'] = [maps[stride]['index'] for stride in strides]
    if checkpoint:
        backbone.update(checkpoint=checkpoint, frozen_stages=maps[4]['index'], norm_eval=True)
    pixels = {name: [255 * part for part in net.pretrained_cfg[name]] for name in ('mean', 'std')}
    return {
        'model.backbone': backbone,
        f'model.{neck}.in_channels': [maps[stride]['num_chs'] for stride in strides],
        **{f'model.data_preprocessor.{name}': value for name, value in pixels.items()},
    }


def _scoped(name: str, like: str | type) -> str:
    """The name with the scope that another type has: MMSegmentation says ``'mmdet.'``."""
    return f'mmdet.{name}' if str(like).rpartition('.')[0] == 'mmdet' else name


def _module(base: str) -> str:
    """A path as ``import`` says it, seen from the file that imports."""
    *folders, file = Path(base).with_suffix('').parts
    up = folders.count('..')
    names = [*folders[up:], file]
    if not all(name.isidentifier() for name in names):
        raise ValueError(
            f'{base} is a config in Python style, which others import: rename its file and folders '
            'to names that Python can import'
        )
    return '.' * (up + 1) + '.'.join(names)


def _code(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return f'dict({", ".join(f"{name}={_code(entry)}" for name, entry in value.items())})'


def stock_config(model_config: ConfigDict) -> ConfigDict:
    """A new config of the stock model behind a Lite model's ``model``.

    Raises:
        ValueError: The config is not of a Lite model.
    """
    config = copy.deepcopy(model_config)
    _, holder, family = find_holder(config)
    if not is_lite(holder['type']):
        raise ValueError(
            f'{family.stock} is no Lite detector; a warm start needs the config of the Lite model '
            'that is to be trained'
        )
    holder['type'] = _scoped(family.stock, holder['type'])
    holder['encoder'] = {k: v for k, v in holder['encoder'].items() if k in STOCK_ENCODER}
    attentions = [holder['encoder']['layer_cfg'].get('self_attn_cfg')]
    if 'decoder' in holder:
        holder['decoder'].pop('key_aware', None)
        attentions.append(holder['decoder']['layer_cfg'].get('cross_attn_cfg'))
    for attention in filter(None, attentions):
        for name in ('proj_key', 'same_loc'):
            attention.pop(name, None)
    forget_building(config)
    return config


def forget_building(model_config: dict) -> None:
    """Remove from a model's config, in place, what building has written into it.

    Building another model refuses to find it there.
    """
    holder = find_holder(model_config)[1]
    for name, entries in (
        ('bbox_head', ('share_pred_layer', 'num_pred_layer', 'as_two_stage')),
        ('dn_cfg', ('num_classes', 'embed_dims', 'num_matching_queries')),
    ):
        for entry in entries:
            holder.get(name, {}).pop(entry, None)
