"""Which graph a model of MMDetection is exported as."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from torch import nn

from ..openmmlab.families import Family, encoder_name, family_of, find_holder
from .graph import EXPORTABLE, Graph

# ``Family.graph`` -> where the graph is.
GRAPHS = {
    'detector': 'graph:DetectorGraph',
    'ddq': 'ddq_detr:DDQGraph',
    'grounding': 'grounding_dino:GroundingGraph',
    'mask2former': 'mask2former:SegmenterGraph',
}
# Where the models that can be exported keep their encoder's holder.
_HOLDERS = ((), ('panoptic_head', 'pixel_decoder'))


def make_graph(model: nn.Module, text: Sequence[str] | None = None) -> Graph:
    """The model as one function of its images.

    Args:
        model (nn.Module): A model of MMDetection or mmlite.
        text (Sequence[str], optional): What a model that reads text shall look for, one name a
            class. The others take none.

    Returns:
        Graph: In eval mode; shares the modules of the model.

    Raises:
        ValueError: The model cannot be exported, or there is a text too few or too many.
    """
    family = family_of(model.get_submodule(_holder_name(model)))
    if text is not None and not family.reads_text:
        raise ValueError(f'{type(model).__name__} takes no text; only Grounding DINO does')
    module, _, name = GRAPHS[family.graph].partition(':')
    cls = getattr(import_module(f'.{module}', __package__), name)
    return (cls(model, text) if family.reads_text else cls(model)).eval()


def check_config(model_config: dict) -> Family:
    """Refuse a model that cannot be exported before it is built.

    Args:
        model_config (dict): ``model`` of a config.

    Returns:
        Family: That of the model.

    Raises:
        ValueError: The model has no deformable encoder, or it wraps a detector that has one.
    """
    path, _, family = find_holder(model_config)
    if path not in _HOLDERS:
        kind = model_config.get('type')
        raise ValueError(
            f'{getattr(kind, "__name__", kind)} cannot be exported; export the detector inside: '
            f'write a config whose model is model.{".".join(path)} of this one'
        )
    return family


def encoder_of(model: nn.Module) -> nn.Module:
    """The deformable encoder."""
    return model.get_submodule(encoder_name(model))


def low_levels_of(model: nn.Module) -> tuple[int, ...]:
    """The indices of a Lite encoder's low-level maps, known from the family alone."""
    schedule = encoder_of(model).schedule
    family = family_of(model.get_submodule(_holder_name(model)))
    return family.low_levels(schedule.num_levels, schedule.num_low_levels)


def _holder_name(model: nn.Module) -> str:
    try:
        return encoder_name(model).rpartition('.')[0]
    except ValueError as error:
        raise ValueError(f'{error}; exported can be {EXPORTABLE}') from error
