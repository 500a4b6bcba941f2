"""Our operators as ONNX nodes: domain ``mmlite``, version 1.

    KeyAwareDeformAttn(query, value, spatial_shapes, sampling_locations, [key]) -> output
    MSDeformAttn(value, spatial_shapes, sampling_locations, attention_weights) -> output

Layouts are those of :mod:`mmlite.ops`; ``spatial_shapes`` is an int64 input, h0, w0, h1, w1, ...,
so that sizes may be dynamic. Without ``key`` the value serves as its own key.

Both stand for ``mmlite::deform_attn``. Where that takes offsets, the locations are worked out in
front of the node.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..ops import reference

DOMAIN, VERSION = 'mmlite', 1
_INPUTS = {
    'KeyAwareDeformAttn': ('query', 'value', 'spatial_shapes', 'sampling_locations', 'key'),
    'MSDeformAttn': ('value', 'spatial_shapes', 'sampling_locations', 'attention_weights'),
}


@cache
def _define() -> None:
    """Tell ``onnx`` of the operators, so that it can build and check models with them."""
    from onnx.defs import OpSchema, register_schema

    for name, inputs in _INPUTS.items():
        option = OpSchema.FormalParameterOption
        parameters = [
            OpSchema.FormalParameter(
                argument,
                'tensor(int64)' if argument == 'spatial_shapes' else 'T',
                param_option=option.Optional if argument == 'key' else option.Single,
            )
            for argument in inputs
        ]
        floats = [f'tensor({kind})' for kind in ('float', 'float16', 'bfloat16')]
        register_schema(
            OpSchema(
                name,
                DOMAIN,
                VERSION,
                inputs=parameters,
                outputs=[OpSchema.FormalParameter('output', 'T')],
                type_constraints=[('T', floats, 'Floats.')],
            )
        )


def translation_table() -> dict[Callable, Callable]:
    """How ``torch.onnx.export`` writes our operators: its ``custom_translation_table``."""
    from typing import Optional

    from onnxscript import FLOAT, INT64
    from onnxscript import opset18 as onnx
    from onnxscript.values import Opset

    from . import nms  # noqa: F401 - registers distinct_boxes

    _define()
    nodes = Opset(DOMAIN, VERSION)

    def deform_attn(
        query, key, value, spatial_shapes, reference_points, sampling, attention_weights
    ):
        """At locations: :func:`decompositions` have replaced the offsets."""
        if query is None:
            return nodes.MSDeformAttn(value, spatial_shapes, sampling, attention_weights)
        inputs = [query, value, spatial_shapes, sampling]
        return nodes.KeyAwareDeformAttn(*inputs, *([] if key is None else [key]))

    def distinct_boxes(boxes, scores, iou_threshold, most):
        """ONNX's own operator, and the boxes that it names as a mask."""
        chosen = onnx.NonMaxSuppression(
            boxes,
            onnx.Unsqueeze(scores, onnx.Constant(value_ints=[1])),
            onnx.Constant(value_ints=[most]),
            onnx.Constant(value_floats=[iou_threshold]),
            onnx.Constant(value_floats=[-0.5]),  # a negative score stands for no box
        )
        # (image, class, box) of each.
        places = onnx.Gather(chosen, onnx.Constant(value_ints=[0, 2]), axis=1)
        ones = onnx.Expand(onnx.Constant(value_floats=[1.0]), onnx.Shape(places, start=0, end=1))
        nothing = onnx.Mul(scores, onnx.Constant(value_float=0.0))
        marked = onnx.ScatterND(nothing, places, ones)
        return onnx.Greater(marked, onnx.Constant(value_float=0.5))

    # The exporter reads types from annotations that hold objects: an int64 tensor has it join the
    # level sizes, symbols and numbers, to one.
    tensors = dict.fromkeys(
        ('query', 'key', 'reference_points', 'attention_weights'), Optional[FLOAT]
    )
    tensors |= {'value': FLOAT, 'spatial_shapes': INT64, 'sampling': FLOAT}
    tensors |= {'boxes': FLOAT, 'scores': FLOAT, 'iou_threshold': float, 'most': int}
    table = {}
    for function in (deform_attn, distinct_boxes):
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        function.__annotations__ = {name: tensors[name] for name in arguments}
        table[getattr(torch.ops.mmlite, function.__name__).default] = function
    return table


def _locations(spatial_shapes, reference_points, sampling):
    """Where the operator samples."""
    if reference_points is None:
        return sampling
    level_sizes = list(zip(spatial_shapes[::2], spatial_shapes[1::2]))
    return reference.sampling_locations(reference_points, sampling, level_sizes)


def decompositions() -> dict[Callable, Callable]:
    """Our operator from offsets in terms of the one at locations, which runtimes know."""
    operator = torch.ops.mmlite.deform_attn.default

    def deform_attn(
        query, key, value, spatial_shapes, reference_points, sampling, attention_weights
    ):
        if reference_points is None:
            return NotImplemented  # stays as it is
        locations = _locations(spatial_shapes, reference_points, sampling)
        return operator(query, key, value, spatial_shapes, None, locations, attention_weights)

    return {operator: deform_attn}


def attention_as(ms_deform_attn: Callable, key_aware_deform_attn: Callable) -> dict:
    """Our operator in terms of two functions that take the inputs of the nodes."""

    def deform_attn(
        query, key, value, spatial_shapes, reference_points, sampling, attention_weights
    ):
        locations = _locations(spatial_shapes, reference_points, sampling)
        if query is None:
            return ms_deform_attn(value, spatial_shapes, locations, attention_weights)
        return key_aware_deform_attn(query, key, value, spatial_shapes, locations)

    return {torch.ops.mmlite.deform_attn.default: deform_attn}
