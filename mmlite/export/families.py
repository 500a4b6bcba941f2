"""Which graph a detector of MMDetection is exported as."""

from __future__ import annotations

from collections.abc import Sequence

from mmdet.models.detectors import DDQDETR, GroundingDINO, Mask2Former
from torch import nn

from ..openmmlab.families import encoder_name, family_of
from .ddq_detr import DDQGraph
from .graph import DetectorGraph
from .grounding_dino import GroundingGraph
from .mask2former import SegmenterGraph


def make_graph(
    model: nn.Module, text: Sequence[str] | None = None
) -> DetectorGraph | SegmenterGraph:
    """The detector as one function of its images.

    Args:
        model (nn.Module): A detector of MMDetection or mmlite.
        text (Sequence[str], optional): What Grounding DINO shall look for, one name a class. The
            others have no text.

    Returns:
        DetectorGraph | SegmenterGraph: Shares the modules of the detector.

    Raises:
        ValueError: The detector cannot be exported, or there is a text too few or too many.
    """
    if isinstance(model, GroundingDINO):
        return GroundingGraph(model, text or ()).eval()
    if text is not None:
        raise ValueError(f'{type(model).__name__} takes no text; only Grounding DINO does')
    if isinstance(model, Mask2Former):
        return SegmenterGraph(model).eval()
    return (DDQGraph if isinstance(model, DDQDETR) else DetectorGraph)(model).eval()


def encoder_of(model: nn.Module) -> nn.Module:
    """The deformable encoder."""
    return model.get_submodule(encoder_name(model))


def low_levels_of(model: nn.Module) -> tuple[int, ...]:
    """The indices of a Lite encoder's low-level maps, known from the family alone."""
    schedule = encoder_of(model).schedule
    holder = model.get_submodule(encoder_name(model).rpartition('.')[0])
    return family_of(holder).low_levels(schedule.num_levels, schedule.num_low_levels)


def padding_divisor(model: nn.Module) -> int:
    """Sides of padded images are multiples of it."""
    return getattr(model.data_preprocessor, 'pad_size_divisor', 1)
