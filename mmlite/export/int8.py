"""Exported detectors in 8 bits: OpenVINO models quantised by NNCF after training."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .detector import Detector, load, write_description
from .runtimes import import_runtime, openvino_core

# Names, module/node, of what is left in float, a small part of the work: heads, whose numbers are
# boxes and scores, and the first stage, whose scores rank tens of thousands of tokens; where
# attention samples, as a few pixels beside is another place; positions, sines of all frequencies.
KEPT_IN_FLOAT = (
    r'bbox_head\..*',
    r'panoptic_head\.(cls_embed|mask_embed)[./].*',
    r'memory_trans_fc/.*',
    r'.*\.sampling_offsets/.*',
    r'.*\.attention_weights/.*',
    r'decoder\.ref_point_head\..*',
    r'reference_points_fc/.*',
    r'pos_trans_fc/.*',
)


def quantize(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    images: Sequence[np.ndarray | str | os.PathLike],
) -> Detector:
    """Write an exported detector once more, its convolutions and matrix products in 8 bits.

    Only a model for images of one size is much faster so: there OpenVINO can run all products as
    convolutions.

    Args:
        source (str | PathLike): The folder of an export for OpenVINO.
        folder (str | PathLike): Where the new one goes.
        images (Sequence): Calibration images, files or as ``cv2.imread`` gives them: some tens to
            hundreds like those that the detector is for.

    Returns:
        Detector: The new detector, loaded.

    Raises:
        ImportError: nncf or openvino is missing.
        ValueError: The export is not for OpenVINO or quantised already, or there are no images.
    """
    nncf, openvino = import_nncf(), import_runtime('openvino')
    source, folder = Path(source), Path(folder)
    detector = load(source)
    description = detector.description
    if description['format'] != 'openvino':
        hint = '8 bits are for OpenVINO alone: export with --format openvino'
        raise ValueError(f'{source} was exported for {description["format"]}; {hint}')
    if description.get('int8'):
        raise ValueError(f'{source} is quantised already')
    if source.resolve() == folder.resolve():
        raise ValueError(f'the quantised detector needs a folder of its own, other than {source}')
    if not images:
        raise ValueError('quantising needs images to calibrate on, and there are none')
    images = detector.read_all(images)

    core = openvino_core(with_operators=not description['portable'])
    model = core.read_model(str(source / description['model']))
    if all(port.get_partial_shape().is_static for port in model.inputs):
        as_convolutions(model)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images, detector.arguments_of),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(patterns=list(KEPT_IN_FLOAT), validate=False),
    )
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(quantized, str(folder / description['model']), compress_to_fp16=False)
    write_description(folder, {**description, 'int8': {'calibration_images': len(images)}})
    return load(folder)


def as_convolutions(model: Any) -> None:
    """Make the products of tokens with weights convolutions of one pixel, in place.

    Without VNNI, OpenVINO multiplies matrices in 8 bits no faster than in float, but convolves
    twice as fast. Tokens of fixed shapes lie as the channels-last picture that a convolution wants.
    """
    import openvino
    from openvino import opset13

    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != 'MatMul' or any(re.fullmatch(k, name) for k in KEPT_IN_FLOAT):
            continue
        tokens, weights = (port.get_source_output() for port in node.inputs())
        constant, transposed = weights.get_node(), node.get_attributes()
        ranks = len(tokens.get_shape()), len(weights.get_shape())
        if (constant.get_type_name(), ranks) != ('Constant', (3, 2)) or transposed['transpose_a']:
            continue
        kernel = np.asarray(constant.data)
        kernel = kernel if transposed['transpose_b'] else kernel.T  # (out, in)
        picture = opset13.transpose(opset13.unsqueeze(tokens, 2), [0, 3, 1, 2])  # (B, C, N, 1)
        product = opset13.convolution(
            picture,
            openvino.op.Constant(np.ascontiguousarray(kernel[:, :, None, None])),
            *([1, 1], [0, 0], [0, 0], [1, 1]),  # strides, both paddings, dilations
        )
        product.set_friendly_name(name)
        outcome = opset13.squeeze(opset13.transpose(product, [0, 2, 3, 1]), 2)
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(outcome.output(0))
    model.validate_nodes_and_infer_types()


def import_nncf() -> Any:
    """Import NNCF, quietly, or say how to get it."""
    nncf = import_runtime('nncf', "'mmlite-detr[quantize]'")
    nncf.set_log_level(logging.WARNING)
    return nncf
