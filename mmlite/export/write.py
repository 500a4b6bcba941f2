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

import torch
from mmengine.config import Config
from torch import nn

from .detector import Detector, load, write_description
from .operators import PORTABLE, translation_table
from .pipeline import preprocessing
from .program import Traced, trace
from .runtimes import import_runtime, openvino_core
from .web import check_web, write_page

# Format -> what the model is called in its folder.
FILES = {'onnx': 'model.onnx', 'openvino': 'model.xml', 'torch': 'model.pt2', 'web': 'model.onnx'}


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
) -> Detector:
    """Write a detector, from image to boxes, scores and labels, and load it.

    Args:
        model (nn.Module): Deformable DETR, DINO, H-Deformable-DETR, DDQ-DETR, Grounding DINO or
            Mask2Former, stock or Lite.
        folder (str | PathLike): Where ``model.*`` and ``detector.json`` go.
        format (str): ``'onnx'``, ``'openvino'``, ``'torch'`` (torch.export) or ``'web'``: an ONNX
            model and a page that runs it in a browser, always portable.
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
        Detector: The exported detector, loaded.

    Raises:
        ImportError: A package that the format needs is missing.
        FileNotFoundError: The runtime's operators were not built.
        ValueError: The detector cannot be exported so; the message says why.
    """
    if format not in FILES:
        raise ValueError(f'format must be one of {", ".join(FILES)}; got {format!r}')
    if opset not in range(18, 22):
        raise ValueError(f'opset {opset} is not supported; choose 18 to 21')
    if format == 'web':
        check_web(preprocessing(config), batch)
        portable = portable or 'gather'
    form = 'gridsample' if portable is True else portable or None
    if form not in (None, *PORTABLE):
        raise ValueError(f'portable must be one of {", ".join(PORTABLE)}; got {form!r}')
    traced = trace(model, config, size, batch, form, text, from_offsets=format == 'torch')
    return write(traced, folder, format, opset)


def write(traced: Traced, folder: str | os.PathLike, format: str, opset: int = 18) -> Detector:
    """Write a traced detector and its description; see :func:`export_detector`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, program = folder / FILES[format], traced.program
    description = {**traced.description, 'format': format, 'model': path.name}
    if format == 'torch':
        torch.export.save(program, path)
        # Images of fewer rows or columns are outside what torch.export has traced.
        sides = (int(found.lower) for found in program.range_constraints.values())
        description['input'] = {**description['input'], 'least_side': max(sides, default=1)}
    elif format in ('onnx', 'web'):
        to_onnx(program, path, opset)
        if format == 'web':
            write_page(folder)
    else:  # by way of ONNX
        openvino = import_runtime('openvino')
        core = openvino_core(with_operators=not description['portable'])
        onnx_path = folder / FILES['onnx']
        to_onnx(program, onnx_path, opset)
        openvino.save_model(core.read_model(str(onnx_path)), str(path), compress_to_fp16=False)
        for left_over in folder.glob(f'{onnx_path.name}*'):
            left_over.unlink()
    write_description(folder, description)
    return load(folder)


def to_onnx(program: torch.export.ExportedProgram, path: Path, opset: int = 18) -> None:
    """Write a traced program as ONNX."""
    for package in ('onnx', 'onnxscript'):
        import_runtime(package)
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript import optimizer

    outputs = ('boxes', 'scores', 'labels', 'masks', 'panoptic')
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter warns of what a detector does not use
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            written = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                custom_translation_table=translation_table(),
                input_names=['images', 'image_sizes'][: len(program.graph_signature.user_inputs)],
                output_names=outputs[: len(program.graph_signature.user_outputs)],
            )
            model = written.model
            # What is folded before need not be rewritten, which takes longest.
            optimizer.fold_constants(model)
            # Of two reshapes in a row the first may have more axes than some runtimes take.
            for node in model.graph:
                before = node.inputs[0].producer() if node.op_type == 'Reshape' else None
                if before is not None and before.op_type == 'Reshape':
                    node.replace_input_with(0, before.inputs[0])
            optimizer.remove_unused_nodes(model)
            CommonSubexpressionEliminationPass()(model)
            optimizer.optimize(model)
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
