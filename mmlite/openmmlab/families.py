"""The table of the families that mmlite knows.

A family is a kind of model with a deformable multi-scale encoder. Its *holder* is the module that
keeps the encoder as ``holder.encoder``: the detector itself, or Mask2Former's pixel decoder. A new
family is a row here and one file a room: its Lite class in ``detectors/``, its graph in
``mmlite/export/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmdet.registry import MODELS
from torch import nn


@dataclass(frozen=True)
class Family:
    """What the rooms have to know about a kind of model."""

    stock: str  # type of the holder in MMDetection's ``MODELS``
    lite: str  # type of its Lite variant
    graph: str = 'graph.DetectorGraph'  # how it is exported: a class in ``mmlite.export``
    smallest_first: bool = False  # the smallest map is the first of the pyramid
    reads_text: bool = False  # it takes a text beside the image
    is_dino: bool = False  # ranks proposals by their best class; contents of queries are learned

    def level_ranks(self, num_levels: int) -> tuple[int, ...]:
        """Of every level, how many are smaller, known from the family alone."""
        ranks = range(num_levels)
        return tuple(ranks if self.smallest_first else ranks[::-1])


FAMILIES = [
    Family('DeformableDETR', 'LiteDeformableDETR'),
    Family('HDeformableDETR', 'LiteHDeformableDETR'),
    Family('DINO', 'LiteDINO', is_dino=True),
    Family('DDQDETR', 'LiteDDQDETR', graph='ddq_detr.DDQGraph'),
    Family(
        'GroundingDINO',
        'LiteGroundingDINO',
        'grounding_dino.GroundingGraph',
        reads_text=True,
        is_dino=True,
    ),
    Family(
        'MSDeformAttnPixelDecoder',
        'LiteMSDeformAttnPixelDecoder',
        'mask2former.SegmenterGraph',
        smallest_first=True,
    ),
]


def resolve(kind: str | type | nn.Module) -> type | None:
    """The class of a model, or that a config's ``type`` means; None for an unregistered name.

    A type is a registered name, with or without scope (``'DINO'``, ``'mmdet.DINO'``), a full name
    (``'mmdet.models.detectors.DINO'``), or a class, as in configs in Python's own style.
    """
    if isinstance(kind, str):
        return MODELS.get(kind)
    return type(kind) if isinstance(kind, nn.Module) else kind


def type_name(kind: str | type) -> str:
    """The name of the class that a config's ``type`` means; see :func:`resolve`."""
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def family_of(kind: str | type | nn.Module, subclasses: bool = True) -> Family | None:
    """The family of a holder, its class or a config's ``type``; None where it has none.

    With ``subclasses`` a class that inherits a holder's counts as one.
    """
    known = {MODELS.get(name): each for each in FAMILIES for name in (each.stock, each.lite)}
    bases = getattr(resolve(kind), '__mro__', ())[: None if subclasses else 1]
    return next((known[base] for base in bases if base in known), None)


def is_lite(kind: str | type | nn.Module) -> bool:
    """Whether a holder, its class or a config's ``type`` is a Lite one."""
    bases = getattr(resolve(kind), '__mro__', ())
    return any(MODELS.get(family.lite) in bases for family in FAMILIES)


def reads_text(model: nn.Module) -> bool:
    """Whether a model takes a text beside the image."""
    family = family_of(model)
    return family is not None and family.reads_text


def num_levels_of(encoder: dict) -> int:
    """Number of feature levels that an encoder's config says."""
    return (encoder['layer_cfg'].get('self_attn_cfg') or {}).get('num_levels', 4)


def encoder_name(model: nn.Module) -> str:
    """Name of a model's multi-scale encoder, such as ``panoptic_head.pixel_decoder.encoder``.

    Raises:
        ValueError: It has none.
    """
    for name, part in model.named_modules():
        # A compiled encoder has layers, too. A detector of one's own keeps it as the known do.
        if not hasattr(getattr(part, 'encoder', None), 'layers'):
            continue
        if not name:
            return 'encoder'
        if family_of(part) is not None:
            inside = name.partition('.')[0]
            if hasattr(model.get_submodule(inside), 'test_cfg') and hasattr(part, 'bbox_head'):
                raise ValueError(
                    f'{type(model).__name__} has no multi-scale encoder of its own; take the '
                    f'detector inside, its {inside!r}'
                )
            return f'{name}.encoder'
    raise ValueError(f'{type(model).__name__} has no multi-scale encoder')


def find_holder(model_config: dict) -> tuple[tuple[str, ...], dict, Family]:
    """The part of a config's ``model`` that keeps a deformable encoder, stock or Lite.

    Returns:
        tuple: The keys that lead to the part, none for the model itself; the part; its family.

    Raises:
        ValueError: There is no such part.
    """
    for path, part in parts_of(model_config):
        # Only what has an encoder is looked up: types of other registries would be sought in vain.
        if 'encoder' in part and 'type' in part:
            family = family_of(part['type'], subclasses=False)
            if family is not None:
                return path, part, family
    kind = type_name(model_config.get('type', 'the model'))
    raise ValueError(
        f'{kind} has no deformable encoder that mmlite can replace; it serves '
        f'{", ".join(family.stock for family in FAMILIES)}; docs/any-model.md is for others'
    )


def parts_of(config: Any, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """Every dict in a config, the outer ones first, behind the keys that lead to it."""
    if isinstance(config, dict):
        yield path, config
    elif isinstance(config, (list, tuple)):
        config = dict(enumerate(config))
    else:
        return
    for name, value in list(config.items()):
        yield from parts_of(value, (*path, name))


def unwrapped_datasets(cfg: dict) -> list[dict]:
    """The data sets inside of wrappers such as ``RepeatDataset`` and ``ConcatDataset``."""
    inner = [*(cfg.get('datasets') or ()), *filter(None, [cfg.get('dataset')])]
    return [leaf for part in inner for leaf in unwrapped_datasets(part)] or [cfg]
