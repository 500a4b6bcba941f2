"""Which graph a model of MMDetection is exported as."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from torch import nn

from ..openmmlab.families import encoder_name, family_of, find_holder
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
    """The model as one function of its images, in eval mode; it shares the model's modules.

    A model that reads text looks for ``text``, one name a class. The others take none.

    Raises:
        ValueError: The model cannot be exported, or there is a text too few or too many.
    """
    family = family_of(holder_of(model))
    if text is not None and not family.reads_text:
        raise ValueError(f'{type(model).__name__} takes no text; only Grounding DINO does')
    module, _, name = GRAPHS[family.graph].partition(':')
    cls = getattr(import_module(f'.{module}', __package__), name)
    return (cls(model, text) if family.reads_text else cls(model)).eval()


def check_config(model_config: dict) -> None:
    """Refuse a model that cannot be exported, by ``model`` of its config, before it is built."""
    path, _, _ = find_holder(model_config)
    if path not in _HOLDERS:
        kind = model_config.get('type')
        raise ValueError(
            f'{getattr(kind, "__name__", kind)} cannot be exported; export the detector inside: '
            f'write a config whose model is model.{".".join(path)} of this one'
        )


def holder_of(model: nn.Module) -> nn.Module:
    """The part of a model that keeps its deformable encoder, see :mod:`..openmmlab.families`.

    Raises:
        ValueError: There is none, or the model wraps a detector that has one.
    """
    try:
        return model.get_submodule(encoder_name(model).rpartition('.')[0])
    except ValueError as error:
        raise ValueError(f'{error}; exported can be {EXPORTABLE}') from error
