"""Our operators as ONNX nodes, and in operators that every runtime has.

Nodes are of domain ``mmlite``, version 1:

    KeyAwareDeformAttn(query, value, spatial_shapes, sampling_locations, [key]) -> output
    MSDeformAttn(value, spatial_shapes, sampling_locations, attention_weights) -> output

Layouts are those of :mod:`mmlite.ops`; ``spatial_shapes`` is an int64 input, h0, w0, h1, w1, ...,
so that sizes may be dynamic. Without ``key`` the value serves as its own key. Both stand for
``mmlite::deform_attn`` at locations: in front of the node they are worked out from offsets.
"""

from collections.abc import Callable
from functools import cache
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..openmmlab.mmcv_ext import nms
from ..ops import reference

DOMAIN, VERSION = 'mmlite', 1
_INPUTS = {
    'KeyAwareDeformAttn': ('query', 'value', 'spatial_shapes', 'sampling_locations', 'key'),
    'MSDeformAttn': ('value', 'spatial_shapes', 'sampling_locations', 'attention_weights'),
}
_LIBRARY = torch.library.Library('mmlite', 'FRAGMENT')
_LIBRARY.define(
    'distinct_boxes(Tensor boxes, Tensor scores, float iou_threshold, SymInt most) -> Tensor'
)
deform_attn = torch.ops.mmlite.deform_attn.default
distinct_boxes = torch.ops.mmlite.distinct_boxes.default


def _distinct_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    """Which boxes are not too near to a better one: a mask, so that no size depends on data.

    ``boxes`` (bs, n, 4) are corners; one of a negative score, (bs, n), is none. One that overlaps a
    better one, which is kept, by more than the threshold is not kept, and the best ``most`` are.
    """
    if boxes.dim() != 3 or boxes.shape[-1] != 4 or scores.shape != boxes.shape[:2]:
        found = f'{tuple(boxes.shape)} and {tuple(scores.shape)}'
        raise ValueError(f'boxes must be (B, N, 4) and scores (B, N); got shapes {found}')
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(len(scores)):
        candidates = (scores[image] >= 0).nonzero().squeeze(1)
        chosen = nms(boxes[image, candidates], scores[image, candidates], iou_threshold, 0)
        kept[image, candidates[chosen[:most]]] = True
    return kept


for _device in ('CPU', 'CUDA'):
    _LIBRARY.impl('distinct_boxes', _distinct_boxes, _device)
_LIBRARY.impl('distinct_boxes', lambda boxes, scores, *_: scores.bool(), 'Meta')


def _at_locations(function: Callable) -> dict[Callable, Callable]:
    """Our operator in terms of a function of the same arguments that knows locations alone."""

    def from_any(query, key, value, spatial_shapes, reference_points, sampling, attention_weights):
        if reference_points is not None:
            level_sizes = list(zip(spatial_shapes[::2], spatial_shapes[1::2]))
            sampling = reference.sampling_locations(reference_points, sampling, level_sizes)
        return function(query, key, value, spatial_shapes, None, sampling, attention_weights)

    return {deform_attn: from_any}


def attention_as(ms_deform_attn: Callable, key_aware_deform_attn: Callable) -> dict:
    """Our operator in terms of two functions that take the inputs of the nodes."""

    def either(query, key, value, spatial_shapes, _, locations, attention_weights):
        if query is None:
            return ms_deform_attn(value, spatial_shapes, locations, attention_weights)
        return key_aware_deform_attn(query, key, value, spatial_shapes, locations)

    return _at_locations(either)


def portable(query, key, value, spatial_shapes, _, locations, attention_weights) -> Tensor:
    """The sums of :mod:`mmlite.ops.reference` in another order.

    A runtime would put the samples of all levels together in three copies of the largest tensor of
    all. Here every level stays as ``grid_sample`` leaves it, points before queries, so that whole
    rows of queries are multiplied and added at a time. Locations are clamped, but one that is not a
    number is not caught.
    """
    grids = (2 * locations.clamp(-2.0, 3.0) - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)

    def sample(tokens: Tensor) -> list[Tensor]:
        """What each level has at the points, zero outside: (B*M, D, P, Q)."""
        maps = tokens.permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, D, S)
        samples, start = [], 0
        for grid, height, width in zip(grids, spatial_shapes[::2], spatial_shapes[1::2]):
            level = maps.narrow(-1, start, height * width).unflatten(-1, (height, width))
            samples.append(F.grid_sample(level, grid, align_corners=False))
            start += height * width
        return samples

    samples = sample(value)
    if query is None:
        weights = attention_weights.permute(3, 0, 2, 4, 1).flatten(1, 2).unbind(0)  # (B*M, P, Q)
    else:
        keys = samples if key is None else sample(key)
        query = query.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(2)  # (B*M, D, 1, Q)
        query = query * query.shape[1] ** -0.5
        logits = torch.cat([(query * level).sum(1) for level in keys], 1)  # (B*M, L*P, Q)
        weights = logits.softmax(1).split(locations.shape[4], 1)
    first, *others = ((one * weight.unsqueeze(1)).sum(2) for one, weight in zip(samples, weights))
    total = sum(others, first)  # (B*M, D, Q)
    return total.unflatten(0, (value.shape[0], value.shape[2])).flatten(1, 2).transpose(1, 2)


# Our operator as the one at locations, which runtimes know, and in operators that all of them have.
AT_LOCATIONS, PORTABLE = _at_locations(deform_attn), _at_locations(portable)


class replacing(TorchFunctionMode):
    """Calls of operators go to the functions of a table inside the ``with`` block."""

    def __init__(self, table: dict[Callable, Callable]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.table.get(function, function)(*args, **(kwargs or {}))


@cache
def _define() -> None:
    """Tell ``onnx`` of the operators, so that it can build and check models with them."""
    from onnx.defs import OpSchema, register_schema

    option = OpSchema.FormalParameterOption
    floats = [f'tensor({kind})' for kind in ('float', 'float16', 'bfloat16')]
    for name, arguments in _INPUTS.items():
        inputs = [
            OpSchema.FormalParameter(
                argument,
                'tensor(int64)' if argument == 'spatial_shapes' else 'T',
                param_option=option.Optional if argument == 'key' else option.Single,
            )
            for argument in arguments
        ]
        outputs = [OpSchema.FormalParameter('output', 'T')]
        types = [('T', floats, 'Floats.')]
        register_schema(
            OpSchema(name, DOMAIN, VERSION, inputs=inputs, outputs=outputs, type_constraints=types)
        )


def translation_table() -> dict[Callable, Callable]:
    """How ``torch.onnx.export`` writes our operators: its ``custom_translation_table``."""
    from onnxscript import FLOAT, INT64
    from onnxscript import opset18 as onnx
    from onnxscript.values import Opset

    _define()
    nodes = Opset(DOMAIN, VERSION)

    # The exporter reads the types, which must be objects: an int64 tensor has it join the level
    # sizes, symbols and numbers, to one.
    def attention_node(
        query: Optional[FLOAT],
        key: Optional[FLOAT],
        value: FLOAT,
        spatial_shapes: INT64,
        reference_points: Optional[FLOAT],
        sampling: FLOAT,
        attention_weights: Optional[FLOAT],
    ):
        if query is None:
            return nodes.MSDeformAttn(value, spatial_shapes, sampling, attention_weights)
        inputs = [query, value, spatial_shapes, sampling]
        return nodes.KeyAwareDeformAttn(*inputs, *([] if key is None else [key]))

    def suppression_nodes(boxes: FLOAT, scores: FLOAT, iou_threshold: float, most: int):
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

    return {deform_attn: attention_node, distinct_boxes: suppression_nodes}
