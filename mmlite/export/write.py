"""Write a detector for an inference runtime."""

from __future__ import annotations

import ast
import io
import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from .detector import Detector, load, read_description, write_description
from .operators import PORTABLE, translation_table
from .pipeline import preprocessing
from .program import Traced, trace
from .runtimes import OPEN, import_runtime, openvino_core
from .web import check_web, write_page

# Format -> what the model is called in its folder.
FILES = {'onnx': 'model.onnx', 'openvino': 'model.xml', 'torch': 'model.pt2', 'web': 'model.onnx'}
FILES |= {'tensorrt': 'model.onnx', 'executorch': 'model.pte', 'coreml': 'model.mlpackage'}
# Format -> the packages that write it, and run it where mmlite does.
_ONNX = ('onnx', 'onnxscript')
_PACKAGES = {name: (*_ONNX, 'onnxruntime') for name in ('onnx', 'web')}
_PACKAGES |= {'openvino': (*_ONNX, 'openvino'), 'tensorrt': _ONNX, 'torch': ()}
_PACKAGES |= {'executorch': ('executorch.exir',), 'coreml': ('coremltools',)}
# Names of the model's inputs and outputs, as far as it has them.
_INPUTS = ('images', 'image_sizes')
_OUTPUTS = ('boxes', 'scores', 'labels', 'masks', 'panoptic')
# What onnxscript would rewrite takes a third of the time, and these are what it finds in detectors:
# factors of 1, terms of 0, norms behind convolutions and, in onnxscript 0.7, shapes that are known.
_RULES = ('mul_by_1_rule', 'add_0_rule', 'fuse_batchnorm_into_conv_rule')
_RULES += ('materialize_reshape_shape_rule',)
# What XNNPACK computes of a program. The arithmetic of attention would make hundreds of pieces of
# it, and each piece that is cut out writes the whole program anew.
_XNNPACK = 'backends.xnnpack.partition'
_KINDS = ('Convolution', 'BatchNorm', 'Linear', 'Addmm', 'MM', 'BMM', 'ReLU', 'MaxPool2d')


def export_detector(
    model: nn.Module,
    folder: str | os.PathLike,
    format: str = 'onnx',
    config: Config | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    portable: bool | str = False,
    opset: int = 18,
    text: Sequence[str] | None = None,
) -> Detector | None:
    """Write a detector, from image to boxes, scores and labels, and load it.

    Args:
        model (nn.Module): Deformable DETR, DINO, H-Deformable-DETR, DDQ-DETR, Grounding DINO or
            Mask2Former, stock or Lite.
        folder (str | PathLike): Where ``model.*`` and ``detector.json`` go.
        format (str): ``'onnx'``, ``'openvino'``, ``'torch'`` (torch.export) or ``'web'``: an ONNX
            model and a page that runs it in a browser, always portable. ``'tensorrt'`` is an ONNX
            model for TensorRT alone: standard attention by its plugin, key-aware by ``Gather``.
            ``'executorch'`` and ``'coreml'``, by ``Gather``, are for images of one ``size``.
        config (Config, optional): Where the names of the classes and the test pipeline are read.
        size (tuple[int, int], optional): (h, w) of the canvas that images are fitted into.
        batch (int, optional): Images at a time; None for any number.
        portable (bool | str): Use no operators of ours: slower, for runtimes that take none.
            ``'gridsample'`` samples by ``GridSample``, ``'gather'`` by ``Gather`` and arithmetic,
            for runtimes without it; True is the first.
        opset (int): Version of ONNX's operators.
        text (Sequence[str], optional): What Grounding DINO looks for, one name a class; by default
            the classes of ``config``.

    Returns:
        Detector, optional: The exported detector, loaded; None for TensorRT and CoreML.

    Raises:
        ImportError: A package that the format needs is missing.
        FileNotFoundError: The runtime's operators were not built.
        ValueError: The detector cannot be exported so; the message says why.
    """
    if format not in FILES:
        raise ValueError(f'format must be one of {", ".join(FILES)}; got {format!r}')
    if opset not in range(18, 22):
        raise ValueError(f'opset {opset} is not supported; choose 18 to 21')
    if format in ('executorch', 'coreml') and (size is None or batch is None):
        raise ValueError(
            f'{format} takes images of one size: add --image-size, and no --batch-size any'
        )
    if format == 'web':
        check_web(preprocessing(config), batch)
    if format in ('web', 'executorch', 'coreml'):
        portable = portable or 'gather'
    form = 'gridsample' if portable is True else portable or None
    if form not in (None, *PORTABLE):
        raise ValueError(f'portable must be one of {", ".join(PORTABLE)}; got {form!r}')
    form = 'tensorrt' if format == 'tensorrt' else form
    traced = trace(model, config, size, batch, form, text, from_offsets=format == 'torch')
    return write(traced, folder, format, opset)


def write(
    traced: Traced, folder: str | os.PathLike, format: str, opset: int = 18
) -> Detector | None:
    """Write a traced detector and its description; see :func:`export_detector`."""
    need_packages(format)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, program = folder / FILES[format], traced.program
    description = {**traced.description, 'format': format, 'model': path.name}
    if format == 'torch':
        torch.export.save(program, path)
        # Images of fewer rows or columns are outside what torch.export has traced.
        sides = (int(found.lower) for found in program.range_constraints.values())
        description['input'] = {**description['input'], 'least_side': max(sides, default=1)}
    elif format == 'executorch':
        path.write_bytes(to_executorch(program))
    elif format == 'coreml':
        to_coreml(program, path)
    elif format != 'openvino':
        to_onnx(program, path, opset, description['portable'])
        if format == 'web':
            write_page(folder)
    else:
        with TemporaryDirectory(dir=folder) as onnx:
            to_onnx(program, Path(onnx, FILES['onnx']), opset, description['portable'])
            write_description(onnx, {**description, 'model': FILES['onnx']})
            return to_openvino(onnx, folder)
    write_description(folder, description)
    return load(folder) if format in OPEN else None


def need_packages(format: str) -> None:
    """Import what writes a format, or say with an ImportError how to install it."""
    for name in _PACKAGES[format]:
        import_runtime(name, name.partition('.')[0])


def to_openvino(source: str | os.PathLike, folder: str | os.PathLike) -> Detector:
    """Write for OpenVINO, and load, what :func:`write` wrote as ONNX: nothing is traced again."""
    description = read_description(source)
    core = openvino_core(with_operators=not description['portable'])
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, FILES['openvino'])
    model = core.read_model(str(Path(source, description['model'])))
    import_runtime('openvino').save_model(model, str(path), compress_to_fp16=False)
    write_description(folder, {**description, 'format': 'openvino', 'model': path.name})
    return load(folder)


def to_onnx(
    program: torch.export.ExportedProgram, path: Path, opset: int = 18, portable: str | None = None
) -> None:
    """Write a program as ONNX, which was traced with ``portable``."""
    from onnx_ir.passes import common as passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter warns of what a detector does not use
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            options = {
                'optimize': False,
                'opset_version': opset,
                'custom_translation_table': translation_table(portable == 'tensorrt'),
                'input_names': _INPUTS[: len(program.graph_signature.user_inputs)],
                'output_names': _OUTPUTS[: len(program.graph_signature.user_outputs)],
            }
            # Decomposing traces the graph twice more, and what needs it we translate ourselves.
            program.run_decompositions = lambda *_: program  # type: ignore[method-assign]
            try:
                written = torch.onnx.export(program, dynamo=True, **options)
            except torch.onnx.OnnxExporterError:  # a detector of one's own may have more
                del program.run_decompositions
                written = torch.onnx.export(program, dynamo=True, **options)
            model = written.model
            optimizer.inline(model)
            optimizer.fold_constants(model, onnx_shape_inference=True)
            # Of two reshapes in a row the first may have more axes than some runtimes take.
            for node in model.graph:
                before = node.inputs[0].producer() if node.op_type == 'Reshape' else None
                if before is not None and before.op_type == 'Reshape' and _keeps(node, before):
                    node.replace_input_with(0, before.inputs[0])
            optimizer.remove_unused_nodes(model)
            chosen = [getattr(rules, name) for name in _RULES if name in dir(rules)]
            rewriter.rewrite(model, rewriter.RewriteRuleSet(chosen, commute=True))
            optimizer.fold_constants(model, onnx_shape_inference=True)
            optimizer.remove_unused_nodes(model)
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            passes.DeduplicateInitializersPass()(model)
            passes.CommonSubexpressionEliminationPass()(model)
            passes.OutputFixPass()(model)
            passes.NameFixPass()(model)
    except Exception as error:
        reason = str(error).strip().rpartition('\n')[2]
        raise ValueError(f'the model cannot be written as ONNX: {reason}') from error
    finally:
        logging.disable(disabled)
    # encoder.layers.0.norms.0/node_layer_norm: profilers and quantisation see names alone.
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get('pkg.torch.onnx.name_scopes', '[]'))
        if len(scopes) > 1:  # the last is the node itself
            node.name = f'{scopes[-2].removeprefix("model.")}/{node.name}'.lstrip('/')
    for value in model.graph.inputs:
        names = ('batch', 'channels', 'height', 'width') if value.name == 'images' else ('batch',)
        for axis, name in enumerate(names[: len(value.shape)]):
            if not isinstance(value.shape[axis], int):
                value.shape[axis] = name
    written.save(str(path))


def _keeps(node: Any, before: Any) -> bool:
    """Whether a reshape leaves the axes that the next one, ``node``, copies as they were."""
    sizes = node.inputs[1]
    if sizes.producer() is not None and sizes.producer().op_type == 'Concat':
        sizes = sizes.producer().inputs[0]  # zeros come first
    if sizes.const_value is None:
        return True
    copied = (sizes.const_value.numpy() == 0).nonzero()[0].max(initial=-1) + 1
    shapes = [value.inputs[0].shape for value in (before, node)]
    return copied == 0 or (None not in shapes and shapes[0][:copied] == shapes[1][:copied])


def to_executorch(program: torch.export.ExportedProgram) -> bytes:
    """Lower a traced program, for images of one size, with its products on XNNPACK."""
    exir, xnnpack, config = (
        import_runtime(f'executorch.{name}', 'executorch')
        for name in ('exir', f'{_XNNPACK}.xnnpack_partitioner', f'{_XNNPACK}.config')
    )
    partitioner = xnnpack.XnnpackPartitioner([getattr(config, f'{kind}Config') for kind in _KINDS])
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner])
    return lowered.to_executorch().buffer


def to_coreml(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a traced program, for images of one size, as an ML program of CoreML."""
    coremltools = import_runtime('coremltools')
    names = _OUTPUTS[: len(program.graph_signature.user_outputs)]
    aten, table = torch.ops.aten, torch.export.default_decompositions()
    table.update({aten.floor_divide.default: _quotient, aten.div.Tensor_mode: _quotient})
    table[aten.index_select.default] = _rows
    try:
        coremltools.convert(
            program.run_decompositions(table),
            outputs=[coremltools.TensorType(name=name) for name in names],
            minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=coremltools.precision.FLOAT32,  # float16 has no index above 2048
            skip_model_load=True,
        ).save(str(path))
    except Exception as error:
        reason = str(error).strip().rpartition('\n')[2]
        raise ValueError(f'the model cannot be written for CoreML: {reason}') from error


def _quotient(number: Tensor, divisor: int, rounding_mode: str = 'floor') -> Tensor:
    """``number // divisor``, below 2^23, where coremltools would leave a float."""
    if number.is_floating_point() or rounding_mode != 'floor':
        return NotImplemented  # stays as it is
    # Half a step from the next quotient, so that it holds where a division is not exact.
    return ((number + 0.5) / divisor).floor().to(number.dtype)


def _rows(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """``index_select``, which CoreML has for numbers alone."""
    if tensor.dtype != torch.bool:
        return NotImplemented
    return tensor.float().index_select(axis, index) > 0.5
