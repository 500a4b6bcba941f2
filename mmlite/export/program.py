"""A detector traced by torch.export, and what ``detector.json`` says of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor, nn

from .. import ops
from ..models import Change
from ..openmmlab.families import encoder_name, family_of, reads_text
from ..openmmlab.layers import LiteEncoder, fuse_into
from .detector import FORMAT_VERSION, check_size
from .graph import Graph
from .graphs import holder_of, make_graph
from .pipeline import class_names, preprocessing
from .portable import portable_decompositions

# Sizes that a graph of free sizes is traced with: no level of the pyramid is one pixel wide, which
# would make its size a constant.
_EXAMPLE_SIZE = (256, 320)


class Traced(NamedTuple):
    """A traced detector.

    Attributes:
        program (ExportedProgram): Its inputs and outputs are those of :class:`.graph.Graph`.
        description (dict): What ``detector.json`` says, but for the format.
    """

    program: torch.export.ExportedProgram
    description: dict[str, Any]


@contextmanager
def exportable(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its attention on our operators, as it was again behind the ``with`` block."""
    holder = holder_of(model)
    encoder = holder.encoder
    change = Change('export')
    try:
        for name, module in list(model.named_modules()):
            change.set(model, name, 'training', False)
            # torch.export copies it, and the parts of DDQ-DETR speak through a shared one.
            if 'cache_dict' in vars(module):
                change.set(model, name, 'cache_dict', module.cache_dict)
        fuse_into(change, model)
        if isinstance(encoder, LiteEncoder) and encoder.low_levels is None:
            # Comparing the maps' sizes would bind a graph to them.
            levels = encoder.schedule.num_levels, encoder.schedule.num_low_levels
            low_levels = family_of(holder).low_levels(*levels)
            change.set(model, encoder_name(model), 'low_levels', low_levels)
        yield model
    finally:
        change.undo(model)


def trace(
    model: nn.Module,
    config: Config | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    portable: bool = False,
    text: Sequence[str] | None = None,
) -> Traced:
    """Trace a detector from images to what it finds; see :func:`mmlite.export.export_detector`."""
    if text is None and reads_text(model):
        text = class_names(config, model)
    name = type(model).__name__
    height, width = size or _EXAMPLE_SIZE
    with exportable(model):
        graph = make_graph(model, text)
        description = describe(graph, config, size, batch, portable)
        divisor = description['input']['divisor']
        if height % divisor or width % divisor:
            raise ValueError(
                f'{name} pads images to multiples of {divisor}; choose such a size, '
                f'not {height} x {width}'
            )
        check_size(description, height, width)
        count = batch or 2
        arguments = [torch.zeros(count, 3, height, width)]
        any_batch = {} if batch else {0: torch.export.Dim.AUTO}
        dynamic = [any_batch | ({} if size else dict.fromkeys((2, 3), torch.export.Dim.AUTO))]
        if description['input']['padded']:
            arguments.append(torch.tensor([[height, width]] * count))
            dynamic.append(any_batch)
        try:
            program = _export(graph, arguments, portable, tuple(dynamic))
        except ValueError:
            raise
        except Exception as error:  # what cannot be traced fails in any way
            reason = str(error).strip().partition('\n')[0]
            hint = '' if size else '; a fixed size may work'
            raise ValueError(f'{name} cannot be traced: {reason}{hint}') from error
    inputs = [node.meta['val'] for node in program.graph.nodes if node.op == 'placeholder']
    for value, free in zip(inputs[-len(arguments) :], dynamic):
        if any(isinstance(value.shape[axis], int) for axis in free):
            raise ValueError(
                f'{name} cannot be exported for images of any size or number; '
                'give a fixed size and batch'
            )
    return Traced(program, description)


def trace_encoder(
    model: nn.Module, graph: nn.Module, tokens: Tensor, pos: Tensor, portable: bool = False
) -> torch.export.ExportedProgram:
    """Trace the encoder of a detector alone, for fixed sizes.

    ``graph`` calls it with tokens and their positions, both (bs, num_tokens, embed_dims), and
    returns the memory.
    """
    with exportable(model):
        return _export(graph.eval(), [tokens, pos], portable)


def _export(
    graph: nn.Module, arguments: Sequence[Tensor], portable: bool, dynamic: tuple | None = None
) -> torch.export.ExportedProgram:
    # Our operators, where they are built, are what a portable graph is made from, too.
    built = any(backend.name == 'cpu' and backend.available for backend in ops.backends())
    backend = 'cpu' if built or not portable else 'reference'
    with ops.use_backend(backend), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.export.export(graph, tuple(arguments), dynamic_shapes=dynamic, strict=False)
        return program.run_decompositions(portable_decompositions()) if portable else program


def describe(
    graph: Graph,
    config: Config | None,
    size: tuple[int, int] | None,
    batch: int | None,
    portable: bool,
) -> dict[str, Any]:
    """What ``detector.json`` says, but for the format; see :func:`trace`."""
    model = graph.model
    preprocessor = model.data_preprocessor
    normalises = getattr(preprocessor, '_enable_normalize', False)
    prepared = preprocessing(config)
    if size is not None:
        prepared = {'resize': {'canvas': list(size)}, 'pad': None}
    schedule = getattr(holder_of(model).encoder, 'schedule', None)
    divisor = getattr(preprocessor, 'pad_size_divisor', 1)
    described = {
        'version': FORMAT_VERSION,
        'mmlite': version('mmlite'),
        'detector': type(model).__name__,
        'schedule': None if schedule is None else str(schedule),
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
            'strides': _strides(model) if graph.least_tokens else [],
            'least_tokens': graph.least_tokens,
        },
        'preprocessing': {
            **prepared,
            'channels': 'BGR',
            # Done by the model itself; here for the record.
            'in_the_model': {
                'to_rgb': bool(getattr(preprocessor, '_channel_conversion', False)),
                'mean': preprocessor.mean.flatten().tolist() if normalises else None,
                'std': preprocessor.std.flatten().tolist() if normalises else None,
            },
        },
    }
    return described | graph.described


def _strides(model: nn.Module) -> list[int]:
    """Strides of the pyramid, largest map first."""
    side = 256
    with torch.no_grad():
        return [
            side // feat.shape[-1] for feat in model.extract_feat(torch.zeros(1, 3, side, side))
        ]
