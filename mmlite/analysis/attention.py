"""Where a deformable attention looks and how much each point weighs.

The operators return neither. What a module was called with is caught by a hook, and locations and
weights are computed once more, whichever backend has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ..nn import InterleavedEncoder
from ..nn.attention import DeformableAttention, SamplingAttention
from ..nn.distill import keep_outputs
from ..openmmlab.families import encoder_name
from ..openmmlab.layers import level_sizes
from .complexity import called_with, named_arguments

# Runs a detector of ``build_detector`` on an image.
Run = Callable[[], DetDataSample]
XY = tuple[float, float]


@dataclass(frozen=True)
class AttentionMap:
    """What the queries of one image attend to."""

    locations: Tensor  # normalised (x, y), float32, shape (Q, M, L, P, 2)
    weights: Tensor  # sum to 1 over levels and points, float32, shape (Q, M, L, P)
    spatial_shapes: list[tuple[int, int]]  # (h, w) of every level that is read
    levels: Sequence[int]  # their indices

    def __getitem__(self, query: int | Tensor) -> AttentionMap:
        """The same of one query, or of several."""
        chosen = torch.as_tensor(query).reshape(-1)
        locations, weights = self.locations[chosen], self.weights[chosen]
        return replace(self, locations=locations, weights=weights)


@torch.no_grad()
def attention_map(module: MultiScaleDeformableAttention, call: dict) -> AttentionMap:
    """Compute what all queries attend to, of the first image of the batch, on the CPU.

    ``call`` is what the module was called with, by name.
    """
    query = call['query']
    value = query if call.get('value') is None else call['value']
    if call.get('query_pos') is not None:
        query = query + call['query_pos']
    if not module.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    query, value, points = query[:1], value[:1], call['reference_points'][:1]
    sizes, levels, mask = level_sizes(call['spatial_shapes']), call.get('levels'), None
    if call.get('key_padding_mask') is not None:
        mask = call['key_padding_mask'][:1]
    # mmcv's class has all that the methods of ours need.
    kind = type(module) if isinstance(module, SamplingAttention) else DeformableAttention
    locations = kind.locate(module, query, points, sizes, levels)[0].float()
    logits = kind.logits(module, query, value, mask, points, sizes, levels)[0].float()
    weights = logits.softmax(-1).unflatten(-1, (len(sizes), -1))
    levels = levels or range(len(sizes))
    return AttentionMap(locations.cpu(), weights.cpu(), list(sizes), levels)


@contextmanager
def record_attention(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, AttentionMap]]:
    """Catch the attention of modules of a model while they run in the ``with`` block.

    ``names`` are those of deformable attentions, such as ``encoder.layers.5.self_attn``. What it
    yields is filled as the modules run; a later run replaces an earlier one. ValueError where a
    name is not that of a deformable attention.
    """
    known, maps = deformable_attentions(model), {}

    def catch(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        maps[name] = attention_map(module, named_arguments(module, args, kwargs))

    with ExitStack() as hooks:
        for name in names:
            if name not in known:
                there = ', '.join(known) or 'none'
                raise ValueError(f'{name} is no deformable attention; there are {there}')
            # Before the module runs: what it is called with may be overwritten later.
            register = model.get_submodule(name).register_forward_pre_hook
            hooks.enter_context(register(partial(catch, name), with_kwargs=True))
        yield maps


def deformable_attentions(model: nn.Module) -> list[str]:
    """Names of the deformable attentions in a model, in order."""
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, MultiScaleDeformableAttention)]


def level_masses(model: nn.Module, run: Run) -> Tensor:
    """How the attention of the encoder is spread over the levels, on the image that ``run`` runs.

    Returns:
        Tensor: Share of the attention, mean over queries and heads, shape (layers, L, L): layer,
        level of the query, level of the points. NaN where a layer has no queries of that level.
    """
    at = encoder_name(model)
    encoder = model.get_submodule(at)
    names = [f'{at}.layers.{layer}.self_attn' for layer in range(len(encoder.layers))]
    with called_with(encoder) as call, record_attention(model, names) as maps:
        run()
    sizes = level_sizes(call['spatial_shapes'])
    masses = torch.full((len(names), len(sizes), len(sizes)), float('nan'))
    for layer, name in enumerate(names):
        level_of, seen = level_of_queries(encoder, layer, sizes), maps[name]
        shares = seen.weights.sum(-1).mean(1)
        for level in level_of.unique():
            masses[layer, level] = 0
            masses[layer, level, list(seen.levels)] = shares[level_of == level].mean(0)
    return masses


@dataclass(frozen=True)
class QueryAttention:
    """What one query of a detector attends to, and where it is in the image."""

    where: str  # which attention, in words
    attention: AttentionMap  # of the query
    scale: XY  # pixels of the image for a normalised location of 1, (x, y)
    point: XY | None = None  # the query's place in the image
    box: tuple[float, float, float, float] | None = None  # the detected object, (x1, y1, x2, y2)


def attention_at_point(
    model: nn.Module, run: Run, point: XY, layer: int = -1, level: int | None = None
) -> QueryAttention:
    """What the encoder's token at a point attends to.

    ``point`` is (x, y) in pixels of the image; ``layer`` counts from the last where negative;
    ``level``, an index, is by default the largest that the layer updates.

    Raises:
        ValueError: There is no such point, layer or level, or the layer does not update the level.
    """
    at = encoder_name(model)
    encoder = model.get_submodule(at)
    layer = _index('layer', layer, len(encoder.layers))
    name = f'{at}.layers.{layer}.self_attn'
    recording = record_attention(model, [name])
    with called_with(model) as call, called_with(encoder) as encoder_call, recording as maps:
        run()
    height, width = call['data_samples'][0].ori_shape[:2]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        size = f'{width}x{height} pixels (width x height)'
        raise ValueError(f'point {point} is outside the image of {size}')
    sizes = level_sizes(encoder_call['spatial_shapes'])
    level_of = level_of_queries(encoder, layer, sizes)
    level = int(level_of.bincount().argmax()) if level is None else level
    height, width = sizes[_index('level', level, len(sizes), least=0)]
    own = (level_of == level).nonzero()[:, 0]  # row by row
    if not len(own):
        raise ValueError(
            f'encoder layer {layer} does not update level {level}; choose another of either'
        )
    scale = _scale(call)
    x, y = (p / s for p, s in zip(point, scale))
    seen = maps[name][own[int(y * height) * width + int(x * width)]]
    where = f'encoder layer {layer + 1}, token of level {level + 1}'
    return QueryAttention(where, seen, scale, point=point)


def attention_of_object(
    model: nn.Module, run: Run, rank: int = 0, layer: int = -1
) -> QueryAttention:
    """What the decoder's query of a detected object attends to.

    ``rank`` is 0 for the object with the highest score; ``layer`` counts from the last where
    negative.

    Raises:
        ValueError: There is no such layer or object.
    """
    if not hasattr(model, 'decoder'):
        raise ValueError(
            f'the decoder of {type(model).__name__} has no deformable attention; look at a point, '
            "which is the encoder's"
        )
    layer = _index('layer', layer, len(model.decoder.layers))
    name = f'decoder.layers.{layer}.cross_attn'
    recording, head = record_attention(model, [name]), model.get_submodule('bbox_head')
    with keep_outputs([head]) as scores, called_with(model) as call, recording as maps:
        found = run().pred_instances
    _index('object', rank, len(found), least=0)
    logits = scores[0][-1][0]  # last layer, first image
    # The head ranks (query, class) pairs by score, so the rank leads back to the query.
    query = int(logits.flatten().topk(rank + 1).indices[rank] // logits.shape[1])
    names, label = model.dataset_meta['classes'], int(found.labels[rank])
    label = names[label] if label < len(names) else f'class {label}'
    where = f'decoder layer {layer + 1}, {label} {found.scores[rank]:.2f}'
    box = tuple(found.bboxes[rank].tolist())
    return QueryAttention(where, maps[name][query], _scale(call), box=box)


def level_of_queries(encoder: nn.Module, layer: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The level of every query of an encoder layer, int64, shape (Q,)."""
    levels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes).prod(1))
    if not isinstance(encoder, InterleavedEncoder):  # a stock one
        return levels
    return encoder.step_tokens(layer, sizes).pick(levels[None])[0]


def _index(what: str, index: int, count: int, least: int | None = None) -> int:
    """An index that is there, made positive; from ``least`` on, negative ones too by default."""
    if not (-count if least is None else least) <= index < count:
        raise ValueError(f'{what} must be between 0 and {count - 1}; got {index}')
    return index % count


def _scale(call: dict) -> XY:
    """Pixels of the image for a normalised location of 1, (x, y)."""
    meta = call['data_samples'][0].metainfo
    height, width = meta['batch_input_shape']
    factor = meta.get('scale_factor', (1.0, 1.0))
    return width / factor[0], height / factor[1]
