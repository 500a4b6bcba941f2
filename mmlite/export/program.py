"""A detector traced by torch.export, and what ``detector.json`` says of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn.utils import fuse_conv_bn
from mmdet.models import ResNet
from mmengine.config import Config
from torch import nn
from torch._subclasses import FakeTensorMode

from .. import ops
from ..models import Change
from ..openmmlab.families import encoder_name, family_of, find_holder, reads_text, type_name
from ..openmmlab.layers import fuse_into
from .detector import FORMAT_VERSION, check_size
from .graph import EXPORTABLE, Graph
from .operators import AT_LOCATIONS, TABLES, replacing
from .pipeline import class_names, preprocessing


class Traced(NamedTuple):
    """A traced detector."""

    program: torch.export.ExportedProgram  # inputs and outputs are those of Graph.forward
    description: dict[str, Any]  # what detector.json says, but for the format


def check_config(model_config: dict) -> None:
    """Refuse a model that cannot be exported, by ``model`` of its config, before it is built."""
    if family_of(model_config['type']):  # also a class of one's own that inherits a family's
        return
    path, _, _ = find_holder(model_config)
    if path not in ((), ('panoptic_head', 'pixel_decoder')):
        raise ValueError(
            f'{type_name(model_config["type"])} cannot be exported; export the detector inside: '
            f'write a config whose model is model.{".".join(path)} of this one'
        )


def make_graph(model: nn.Module, text: Sequence[str] | None = None) -> Graph:
    """The model, whose modules it shares, as one function of its images."""
    family = family_of(_holder_of(model))
    if text is not None and not family.reads_text:
        raise ValueError(f'{type(model).__name__} takes no text; only Grounding DINO does')
    module, name = family.graph.split('.')
    cls = getattr(import_module(f'.{module}', __package__), name)
    return (cls(model, text) if family.reads_text else cls(model)).eval()


def _holder_of(model: nn.Module) -> nn.Module:
    try:
        return model.get_submodule(encoder_name(model).rpartition('.')[0])
    except ValueError as error:
        raise ValueError(f'{error}; exported can be {EXPORTABLE}') from error


@contextmanager
def exportable(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its attention on our operators inside the ``with`` block."""
    holder, change = _holder_of(model), Change('export')
    try:
        for name, module in list(model.named_modules()):
            change.set(model, name, 'training', False)
            # torch.export copies it, and the parts of DDQ-DETR speak through a shared one.
            if 'cache_dict' in vars(module):
                change.set(model, name, 'cache_dict', module.cache_dict)
        fuse_into(change, model)
        if getattr(holder.encoder, 'level_ranks', ()) is None:
            # Comparing the maps' sizes would bind a graph to them.
            ranks = family_of(holder).level_ranks(holder.encoder.schedule.num_levels)
            change.set(model, encoder_name(model), 'level_ranks', ranks)
        if type(getattr(model, 'backbone', None)) is ResNet:  # a norm follows each convolution
            change.set(model, '', 'backbone', fuse_conv_bn(deepcopy(model.backbone)))
        yield model
    finally:
        change.undo(model)


def trace(
    model: nn.Module,
    config: Config | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    portable: str | None = None,
    text: Sequence[str] | None = None,
    from_offsets: bool = False,
) -> Traced:
    """Trace a detector from images to what it finds; see :func:`mmlite.export.export_detector`.

    ``portable`` is one of :data:`.operators.TABLES`. With ``from_offsets`` attention takes
    offsets, as only torch knows it, instead of locations.
    """
    if text is None and reads_text(model):
        text = class_names(config, model)
    name = type(model).__name__
    # Where sizes are free, no level of the pyramid is one pixel wide: its size would be a constant.
    height, width = size or (256, 320)
    with exportable(model):
        graph = make_graph(model, text)
        description = _describe(graph, config, size, batch, portable)
        inputs = description['input']
        divisor = inputs['divisor']
        if height % divisor or width % divisor:
            raise ValueError(f'{name} pads images to multiples of {divisor}; choose such a size')
        check_size(inputs, height, width)
        count = batch or 2
        arguments = [torch.zeros(count, 3, height, width)]
        any_batch = {} if batch else {0: torch.export.Dim.AUTO}
        dynamic = [any_batch | ({} if size else dict.fromkeys((2, 3), torch.export.Dim.AUTO))]
        if inputs['padded']:
            arguments.append(torch.tensor([[height, width]] * count))
            dynamic.append(any_batch)
        try:
            program = export_graph(graph, arguments, portable, from_offsets, tuple(dynamic))
        except ValueError:
            raise
        except Exception as error:  # what cannot be traced fails in any way
            reason = str(error).strip().partition('\n')[0]
            hint = '' if size else '; a fixed size may work'
            raise ValueError(f'{name} cannot be traced: {reason}{hint}') from error
    values = [node.meta['val'] for node in program.graph.nodes if node.op == 'placeholder']
    for value, free in zip(values[-len(arguments) :], dynamic):
        if any(str(value.shape[axis]).isdecimal() for axis in free):
            how = 'images of any size or number; give a fixed size and batch'
            raise ValueError(f'{name} cannot be exported for {how}')
    return Traced(program, description)


def export_graph(graph: nn.Module, arguments, portable, from_offsets=False, dynamic=None):
    """The program of a ``graph`` whose model is :func:`exportable`; as :func:`trace` calls it."""
    table = TABLES[portable] if portable else ({} if from_offsets else AT_LOCATIONS)
    table = {**table, F.dropout: lambda tokens, *_, **__: tokens}
    # Our operators, where they are built, are what a portable graph is made from, too.
    built = any(backend.name == 'cpu' and backend.available for backend in ops.backends())
    backend = 'cpu' if built or not portable else 'reference'
    with ops.use_backend(backend), torch.no_grad(), replacing(table), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.export.export(graph, tuple(arguments), dynamic_shapes=dynamic, strict=False)


def _describe(graph: Graph, config, size, batch, portable) -> dict[str, Any]:
    model = graph.model
    schedule = getattr(_holder_of(model).encoder, 'schedule', None)
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    prepared = preprocessing(config)
    if size:
        prepared |= {'resize': {'canvas': list(size)}, 'pad': None}
    return {
        'version': FORMAT_VERSION,
        'mmlite': version('mmlite-detr'),
        'detector': type(model).__name__,
        'schedule': schedule and str(schedule),
        'classes': graph.classes or class_names(config, model, graph.num_classes),
        'num_predictions': graph.num_predictions,
        'outputs': list(graph.outputs),
        'portable': portable,
        'input': {
            'batch': batch,
            'height': size and size[0],
            'width': size and size[1],
            # A single image of any size is never padded, and then nothing need be masked.
            'padded': batch != 1 or size is not None or divisor > 1,
            'divisor': divisor,
            'levels': _levels(model, divisor) if graph.least_tokens else [],
            'least_tokens': graph.least_tokens,
        },
        'preprocessing': prepared,
        **graph.described,
    }


def _levels(model: nn.Module, divisor: int) -> list[tuple[int, int]]:
    """Stride and rest of every level, as :func:`.detector.check_size` takes them.

    Images are padded to multiples of ``divisor``; a backbone need not take others.
    """

    @cache
    def rows(side: int) -> list[int]:
        image = torch.zeros(1, 3, math.ceil(side / divisor) * divisor, 128)
        with torch.no_grad():
            return [feat.shape[2] for feat in model.extract_feat(image)]

    levels = []
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone
        for level, most in enumerate(rows(512)):
            stride = 256 // (most - rows(256)[level])
            first = next(side for side in range(513 - stride, 513) if rows(side)[level] == most)
            levels.append((stride, most * stride - first))
    return levels
