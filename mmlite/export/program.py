"""A detector traced by torch.export, and written as ONNX."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import ops
from ..openmmlab.layers import LiteEncoder, fuse_attention
from .families import encoder_of, low_levels_of, make_graph, padding_divisor
from .operators import decompositions, translation_table
from .portable import portable_decompositions

# What the outputs are called, as many as there are.
OUTPUTS = ('boxes', 'scores', 'labels', 'masks', 'panoptic')
_OPSETS = range(18, 22)
# Sizes that a graph of free sizes is traced with: no level of the pyramid is one pixel wide, which
# would make its size a constant.
_EXAMPLE_SIZE = (256, 320)


@contextmanager
def exportable(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its attention on our operators, as it was again behind the ``with`` block."""
    classes = {module: type(module) for module in model.modules()}
    training = model.training
    # torch.export puts copies in their place, and the parts of DDQ-DETR speak through a shared one.
    shared = {
        module: {name: value for name, value in vars(module).items() if name == 'cache_dict'}
        for module in classes
    }
    encoder = encoder_of(model)
    low_levels = getattr(encoder, 'low_levels', None)
    model.eval()
    fuse_attention(model)
    if isinstance(encoder, LiteEncoder) and low_levels is None:
        # Comparing the maps' sizes would bind a graph to them.
        encoder.low_levels = low_levels_of(model)
    try:
        yield model
    finally:
        if isinstance(encoder, LiteEncoder):
            encoder.low_levels = low_levels
        for module, cls in classes.items():
            module.__class__ = cls
            vars(module).update(shared[module])
        model.train(training)


def trace(
    model: nn.Module,
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    padded: bool = False,
    portable: bool = False,
    text: Sequence[str] | None = None,
) -> torch.export.ExportedProgram:
    """Trace a detector from images to boxes, scores and labels; see :mod:`.families`.

    Args:
        model (nn.Module): The detector.
        size (tuple[int, int], optional): (h, w) of the images; None for any.
        batch (int, optional): Images at a time; None for any number.
        padded (bool): Give the graph a second input, the sizes of the images without padding.
        portable (bool): Use no attention of ours.
        text (Sequence[str], optional): What Grounding DINO looks for, one name a class.

    Returns:
        ExportedProgram: Its inputs are those of :class:`.graph.DetectorGraph`.

    Raises:
        ValueError: The detector cannot be exported, or not with images of any size.
    """
    divisor = padding_divisor(model)
    height, width = size or _EXAMPLE_SIZE
    if height % divisor or width % divisor:
        raise ValueError(
            f'{type(model).__name__} pads images to multiples of {divisor}; choose such a size, '
            f'not {height} x {width}'
        )
    count = batch or 2
    arguments = [torch.zeros(count, 3, height, width)]
    any_size = {} if size else dict.fromkeys((2, 3), torch.export.Dim.AUTO)
    any_batch = {} if batch else {0: torch.export.Dim.AUTO}
    dynamic = [{**any_batch, **any_size}]
    if padded:
        arguments.append(torch.tensor([[height, width]] * count))
        dynamic.append(any_batch)
    with (
        exportable(model),
        ops.use_backend(_backend(portable)),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')
        graph = make_graph(model, text)
        try:
            program = torch.export.export(
                graph, tuple(arguments), dynamic_shapes=tuple(dynamic), strict=False
            )
            program = program.run_decompositions(portable_decompositions()) if portable else program
        except ValueError:
            raise
        except Exception as error:  # what cannot be traced fails in any way
            reason = str(error).strip().partition('\n')[0]
            hint = '' if size else '; a fixed size may work'
            raise ValueError(f'{type(model).__name__} cannot be traced: {reason}{hint}') from error
    wanted = [(index, axis) for index, axes in enumerate(dynamic) for axis in axes]
    inputs = [node.meta['val'] for node in program.graph.nodes if node.op == 'placeholder']
    inputs = inputs[-len(arguments) :]
    if any(isinstance(inputs[index].shape[axis], int) for index, axis in wanted):
        raise ValueError(
            f'{type(model).__name__} cannot be exported for images of any size or number; '
            'give a fixed size and batch'
        )
    return program


def trace_encoder(
    model: nn.Module, graph: nn.Module, tokens: Tensor, pos: Tensor, portable: bool = False
) -> torch.export.ExportedProgram:
    """Trace the encoder of a detector alone, for fixed sizes.

    Args:
        model (nn.Module): The detector.
        graph (nn.Module): Calls its encoder, with the two next arguments.
        tokens (Tensor): shape (bs, num_tokens, embed_dims).
        pos (Tensor): Their positional embedding, same shape.
        portable (bool): Use torch's own operators alone, instead of ours.

    Returns:
        ExportedProgram: From tokens and their positions to the memory.
    """
    with exportable(model), ops.use_backend(_backend(portable)), torch.no_grad():
        program = torch.export.export(graph.eval(), (tokens, pos), strict=False)
        return program.run_decompositions(portable_decompositions()) if portable else program


def _backend(portable: bool) -> str:
    """Ours, whose operators are what a portable graph is made from, too, where they are built."""
    built = any(backend.name == 'cpu' and backend.available for backend in ops.backends())
    return 'cpu' if built or not portable else 'reference'


def check_opset(opset: int) -> None:
    """Refuse a version of ONNX's operators that the exporter has not.

    Raises:
        ValueError: There is no such opset.
    """
    if opset not in _OPSETS:
        raise ValueError(
            f'opset {opset} is not supported; choose {_OPSETS.start} to {_OPSETS.stop - 1}'
        )


def to_onnx(program: torch.export.ExportedProgram, path: Path, opset: int = 18) -> None:
    """Write a traced detector as ONNX.

    Args:
        program (ExportedProgram): What :func:`trace` returned.
        path (Path): The file.
        opset (int): Version of ONNX's operators.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: There is no such opset, or the exporter failed.
    """
    check_opset(opset)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"exporting needs {error.name}; install it: pip install 'mmlite-detr[deploy]'"
        ) from error
    inputs = ['images', 'image_sizes'][: len(program.graph_signature.user_inputs)]
    with _quiet():
        try:
            written = torch.onnx.export(
                program.run_decompositions(decompositions()),
                dynamo=True,
                opset_version=opset,
                custom_translation_table=translation_table(),
                input_names=inputs,
                output_names=list(OUTPUTS[: len(program.graph_signature.user_outputs)]),
            )
        except Exception as error:
            reason = str(error).strip().rpartition('\n')[2]
            raise ValueError(f'the model cannot be written as ONNX: {reason}') from error
    _name_nodes(written.model.graph)
    for value in written.model.graph.inputs:
        names = ('batch', 'channels', 'height', 'width') if value.name == 'images' else ('batch',)
        for axis, name in enumerate(names[: len(value.shape)]):
            if not isinstance(value.shape[axis], int):
                value.shape[axis] = name
    written.save(str(path))


def _name_nodes(graph) -> None:
    """Say in each node's name in which module it was: ``encoder.layers.0.norms.0/node_layer_norm``.

    Profilers and quantisation see names alone. Nodes between the modules have none before the name.
    """
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get('pkg.torch.onnx.name_scopes', '[]'))
        if len(scopes) > 1:  # the last is the node itself
            node.name = f'{scopes[-2].removeprefix("model.")}/{node.name}'.lstrip('/')


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns of what a detector does not use."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)
