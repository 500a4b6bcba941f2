"""The table of the families that mmlite knows.

A family is a kind of model with a deformable multi-scale encoder. Its *holder* is the module that
keeps the encoder as ``holder.encoder``: the detector itself, or Mask2Former's pixel decoder. All
code that has to know a family asks here; ``isinstance(model, DINO)`` stands nowhere else.

A new family is a row here and one file a room: its Lite class in ``detectors/``, its graph in
``mmlite/export/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmdet.registry import MODELS
from torch import nn


@dataclass(frozen=True)
class Family:
    """What the rooms have to know about a kind of model.

    Attributes:
        stock (str): Type of the holder in MMDetection's ``MODELS``.
        lite (str): Type of its Lite variant.
        graph (str): How it is exported: a name in :data:`mmlite.export.program.GRAPHS`.
        smallest_first (bool): The smallest map is the first of the pyramid.
        reads_text (bool): It takes a text beside the image.
        is_dino (bool): Its proposals are ranked by their best class, and its queries' contents are
            learned, as in DINO.
    """

    stock: str
    lite: str
    graph: str = 'detector'
    smallest_first: bool = False
    reads_text: bool = False
    is_dino: bool = False

    def low_levels(self, num_levels: int, num_low_levels: int) -> tuple[int, ...]:
        """Indices of the largest maps, known from the family alone."""
        if self.smallest_first:
            return tuple(range(num_levels - num_low_levels, num_levels))
        return tuple(range(num_low_levels))


FAMILIES = [
    Family('DeformableDETR', 'LiteDeformableDETR'),
    Family('HDeformableDETR', 'LiteHDeformableDETR'),
    Family('DINO', 'LiteDINO', is_dino=True),
    Family('DDQDETR', 'LiteDDQDETR', graph='ddq'),
    Family('GroundingDINO', 'LiteGroundingDINO', graph='grounding', reads_text=True, is_dino=True),
    Family(
        'MSDeformAttnPixelDecoder',
        'LiteMSDeformAttnPixelDecoder',
        graph='mask2former',
        smallest_first=True,
    ),
]


def resolve(kind: str | type) -> type | None:
    """The class that a config's ``type`` means; None for a name that is not registered.

    A type is a registered name, with or without scope (``'DINO'``, ``'mmdet.DINO'``), a full name
    (``'mmdet.models.detectors.DINO'``), or a class, as in configs in Python's own style.
    """
    return kind if isinstance(kind, type) else MODELS.get(kind)


def type_name(kind: str | type) -> str:
    """The name of the class that a config's ``type`` means; see :func:`resolve`."""
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def family_of(kind: str | type | nn.Module, subclasses: bool = True) -> Family | None:
    """The family of a holder, its class or a config's ``type``; None where it has none.

    With ``subclasses`` a class that inherits a holder's counts as one.
    """
    cls = type(kind) if isinstance(kind, nn.Module) else resolve(kind)
    for base in (cls.__mro__ if subclasses else (cls,)) if isinstance(cls, type) else ():
        for family in FAMILIES:
            if base in (MODELS.get(family.stock), MODELS.get(family.lite)):
                return family
    return None


def is_lite(kind: str | type | nn.Module) -> bool:
    """Whether a holder, its class or a config's ``type`` is a Lite one."""
    cls = type(kind) if isinstance(kind, nn.Module) else resolve(kind)
    return isinstance(cls, type) and any(
        issubclass(cls, MODELS.get(family.lite)) for family in FAMILIES
    )


def reads_text(model: nn.Module) -> bool:
    """Whether a model takes a text beside the image."""
    family = family_of(model)
    return family is not None and family.reads_text


def encoder_name(model: nn.Module) -> str:
    """Name of a model's multi-scale encoder, such as ``panoptic_head.pixel_decoder.encoder``.

    Raises:
        ValueError: It has none.
    """
    # A compiled encoder has layers, too; a detector of one's own keeps its encoder there as well.
    if hasattr(getattr(model, 'encoder', None), 'layers'):
        return 'encoder'
    for name, part in model.named_modules():
        if _keeps_encoder(part):
            inside = name.partition('.')[0]
            if hasattr(model.get_submodule(inside), 'test_cfg') and hasattr(part, 'bbox_head'):
                raise ValueError(
                    f'{type(model).__name__} has no multi-scale encoder of its own; take the '
                    f'detector inside, its {inside!r}'
                )
            return f'{name}.encoder'
    raise ValueError(f'{type(model).__name__} has no multi-scale encoder')


def _keeps_encoder(module: nn.Module) -> bool:
    # A compiled encoder has layers, too; a family's encoder may have been taken out or replaced.
    encoder = getattr(module, 'encoder', None)
    return hasattr(encoder, 'layers') and family_of(module) is not None


def find_holder(model_config: dict) -> tuple[tuple[str, ...], dict, Family]:
    """The part of a model's config that keeps a deformable encoder, stock or Lite.

    Args:
        model_config (dict): ``model`` of a config.

    Returns:
        tuple: The keys that lead to the part, none for the model itself; the part; its family.

    Raises:
        ValueError: There is no such part.
    """
    found = _search(model_config, ())
    if found is None:
        kind = type_name(model_config.get('type', 'the model'))
        raise ValueError(
            f'{kind} has no deformable encoder that mmlite can replace; it serves '
            f'{", ".join(family.stock for family in FAMILIES)}'
        )
    return found


def _search(config: Any, path: tuple[str, ...]) -> tuple[tuple[str, ...], dict, Family] | None:
    if not isinstance(config, dict):
        return None
    # Only what has an encoder is looked up: types of other registries would be sought in vain.
    if 'encoder' in config and 'type' in config:
        family = family_of(config['type'], subclasses=False)
        if family is not None:
            return path, config, family
    parts = (_search(value, (*path, name)) for name, value in config.items())
    return next((part for part in parts if part is not None), None)
