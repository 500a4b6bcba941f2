"""Our operators as ONNX nodes, and in operators that every runtime has.

Nodes are of domain ``mmlite``, version 1:

    KeyAwareDeformAttn(query, value, spatial_shapes, sampling_locations, [key]) -> output
    MSDeformAttn(value, spatial_shapes, sampling_locations, attention_weights) -> output

Layouts are those of :mod:`mmlite.ops`; ``spatial_shapes`` is an int64 input, h0, w0, h1, w1, ...,
so that sizes may be dynamic. Without ``key`` the value serves as its own key. Both stand for
``mmlite::deform_attn`` at locations: in front of the node they are worked out from offsets.
"""

import itertools
from collections.abc import Callable, Sequence
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
# NVIDIA's own, by the name that TensorRT's parser looks for.
_PLUGIN, _PLUGINS = 'MultiscaleDeformableAttnPlugin_TRT', 'trt.plugins'
_PLUGIN_INPUTS = ('value', 'spatial_shapes', 'level_start_index', *_INPUTS['MSDeformAttn'][2:])
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


def portable(sample: Callable, channels: int) -> Callable:
    """The sums of :mod:`mmlite.ops.reference` in another order, in operators of every runtime.

    A runtime would put the samples of all levels together in three copies of the largest tensor of
    all. Here every level stays as ``sample`` leaves it, points before queries, so that whole rows
    are multiplied and added at a time.

    Args:
        sample (Callable): Gets tokens (B, S, M, D), level sizes and of every level locations (B*M,
            P, Q, 2); gives of every level what is at the points, zero outside: (B*M, D, P, Q) or
            (B*M, P, Q, D).
        channels (int): The axis of D in it, 1 or 3.

    Returns:
        Callable: Of the arguments of ``mmlite::deform_attn`` at locations.
    """
    queries, points = (2, 2) if channels == 1 else (1, 1)

    def by_level(tensor: Tensor, *last: int) -> list[Tensor]:
        """(B, Q, M, L, P, ...) -> of every level (B*M, P, Q, ...), by way of few axes."""
        levels, num_points = tensor.shape[3:5]
        rows = tensor.flatten(3).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L*P*...)
        pieces = rows.split(rows.shape[-1] // levels, -1)
        return [piece.unflatten(-1, (num_points, *last)).transpose(1, 2) for piece in pieces]

    def attention(query, key, value, shapes, _, locations, attention_weights) -> Tensor:
        sizes = list(zip(shapes[::2], shapes[1::2]))
        places = [place.clamp(-2.0, 3.0) for place in by_level(locations, 2)]
        samples = sample(value, sizes, places)
        if query is None:
            weights = by_level(attention_weights)
        else:
            keys = samples if key is None else sample(key, sizes, places)
            query = query * query.shape[-1] ** -0.5
            query = query.permute(0, 2, 3, 1) if channels == 1 else query.transpose(1, 2)
            query = query.flatten(0, 1).unsqueeze(queries)
            logits = torch.cat([(query * level).sum(channels) for level in keys], 1)
            weights = logits.softmax(1).split(locations.shape[4], 1)
        first, *others = (
            (one * weight.unsqueeze(channels)).sum(points) for one, weight in zip(samples, weights)
        )
        total = sum(others, first).unflatten(0, (value.shape[0], value.shape[2]))
        return (total.transpose(2, 3) if channels == 1 else total).transpose(1, 2).flatten(2)

    return attention


def sampled(tokens: Tensor, sizes: Sequence, places: Sequence[Tensor]) -> list[Tensor]:
    """By ``grid_sample``: of every level (B*M, D, P, Q).

    Locations that are not a number are not caught.
    """
    maps = tokens.permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, D, S)
    samples, start = [], 0
    for (height, width), place in zip(sizes, places):
        level = maps.narrow(-1, start, height * width).unflatten(-1, (height, width))
        samples.append(F.grid_sample(level, 2 * place - 1, align_corners=False))
        start += height * width
    return samples


def gathered(tokens: Tensor, sizes: Sequence, places: Sequence[Tensor]) -> list[Tensor]:
    """By the rows of the four pixels around every point: of every level (B*M, P, Q, D)."""
    rows = tokens.transpose(1, 2).flatten(0, 2)  # (B*M*S, D)
    batch, total, heads = tokens.shape[:3]
    start = (torch.arange(batch * heads, device=tokens.device) * total).view(-1, 1, 1)
    samples = []
    for (height, width), place in zip(sizes, places):
        x, y = place.select(-1, 0) * width - 0.5, place.select(-1, 1) * height - 0.5
        west, north = x.floor(), y.floor()
        corners = []
        for row, column in itertools.product((north, north + 1), (west, west + 1)):
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = torch.where(inside, row * width + column, 0.0).long()
            share = torch.where(inside, share, 0.0).to(tokens.dtype).unsqueeze(-1)
            corners.append(share * F.embedding(start + index, rows))
        samples.append(corners[0] + corners[1] + corners[2] + corners[3])
        start = start + height * width
    return samples


# Our operator as the one at locations, which runtimes know, and in operators that all of them have.
AT_LOCATIONS = _at_locations(deform_attn)
PORTABLE = {
    'gridsample': _at_locations(portable(sampled, 1)),
    'gather': _at_locations(portable(gathered, 3)),
}


def _for_tensorrt(query: Optional[Tensor], *others):
    """Standard attention stays a node, as TensorRT has a plugin for it; the other is gathered."""
    return (deform_attn if query is None else PORTABLE['gather'][deform_attn])(query, *others)


TABLES = {**PORTABLE, 'tensorrt': _at_locations(_for_tensorrt)}


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
    for name, arguments in {**_INPUTS, _PLUGIN: _PLUGIN_INPUTS}.items():
        domain, whole = (_PLUGINS, 'int32') if name == _PLUGIN else (DOMAIN, 'int64')
        inputs = [
            OpSchema.FormalParameter(
                argument,
                f'tensor({whole})' if argument in ('spatial_shapes', 'level_start_index') else 'T',
                param_option=option.Optional if argument == 'key' else option.Single,
            )
            for argument in arguments
        ]
        outputs = [OpSchema.FormalParameter('output', 'T')]
        types = [('T', floats, 'Floats.')]
        register_schema(
            OpSchema(name, domain, VERSION, inputs=inputs, outputs=outputs, type_constraints=types)
        )


def translation_table(tensorrt: bool = False) -> dict[Callable, Callable]:
    """How ``torch.onnx.export`` writes our operators: its ``custom_translation_table``.

    For TensorRT standard attention is the plugin that NVIDIA ships with it.
    """
    from onnxscript import FLOAT, INT64
    from onnxscript import opset18 as onnx
    from onnxscript.values import Opset

    _define()
    nodes, plugins = Opset(DOMAIN, VERSION), Opset(_PLUGINS, VERSION)

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
        if query is None and tensorrt:  # int32 (L, 2) and (L,), and the heads stay apart
            sizes = onnx.Reshape(spatial_shapes, onnx.Constant(value_ints=[-1, 2]))
            counts = onnx.ReduceProd(sizes, onnx.Constant(value_ints=[1]), keepdims=0)
            starts = onnx.CumSum(counts, onnx.Constant(value_int=0), exclusive=1)
            whole = [onnx.Cast(numbers, to=6) for numbers in (sizes, starts)]
            found = getattr(plugins, _PLUGIN)(value, *whole, sampling, attention_weights)
            return onnx.Reshape(found, onnx.Constant(value_ints=[0, 0, -1]))
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

    # What the exporter takes apart by tracing the graph again.
    def cast(tensor, dtype: int):
        return onnx.Cast(tensor, to=dtype)

    def flatten(tensor, start_dim: int = 0, end_dim: int = -1):
        shape = [size if isinstance(size, int) else 0 for size in tensor.shape]  # 0 is as it was
        first, last = start_dim % len(shape), end_dim % len(shape) + 1
        sizes = onnx.Constant(value_ints=[*shape[:first], -1])
        if last < len(shape):
            sizes = onnx.Concat(sizes, onnx.Shape(tensor, start=last), axis=0)
        return onnx.Reshape(tensor, sizes)

    def norm(tensor, weight, bias, mean, var, training: bool, momentum: float, eps: float, _: bool):
        return onnx.BatchNormalization(tensor, weight, bias, mean, var, epsilon=eps)

    aten = torch.ops.aten
    return {
        deform_attn: attention_node,
        distinct_boxes: suppression_nodes,
        aten.to.dtype: cast,
        aten.flatten.using_ints: flatten,
        aten.batch_norm.default: norm,
        aten.relu_.default: lambda tensor: onnx.Relu(tensor),
        aten.add_.Tensor: lambda tensor, other: onnx.Add(tensor, other),
        aten.rsub.Scalar: lambda tensor, number: onnx.Sub(onnx.CastLike(number, tensor), tensor),
        aten.__and__.Tensor: lambda first, second: onnx.And(first, second),
        aten.__or__.Tensor: lambda first, second: onnx.Or(first, second),
        aten.detach_.default: lambda tensor: onnx.Identity(tensor),
    }
