"""Where a deformable attention looks and how much each point weighs.

The operators return neither. What a module was called with is caught by a hook, and locations and
weights are computed once more for the few queries that are to be seen, whichever backend has run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from .complexity import called_with

# Given the number of queries, which of them to look at.
Choose = Callable[[int], Tensor]
# Runs a detector of ``build_detector`` on an image.
Run = Callable[[], DetDataSample]
XY = tuple[float, float]


@dataclass(frozen=True)
class AttentionMap:
    """What some queries of one image attend to."""

    queries: Tensor  # their indices among the queries of the module, int64, shape (Q,)
    num_queries: int  # how many queries the module had
    locations: Tensor  # normalised (x, y), float32, shape (Q, M, L, P, 2)
    weights: Tensor  # sum to 1 over levels and points, float32, shape (Q, M, L, P)
    spatial_shapes: list[tuple[int, int]]  # (h, w) of every level that is read

    def level_mass(self) -> Tensor:
        """Share of the attention that goes to each level, mean over heads, shape (Q, L)."""
        return self.weights.sum(-1).mean(1)


def attention_map(
    module: MultiScaleDeformableAttention, args: tuple, kwargs: Mapping, choose: Choose
) -> AttentionMap:
    """Compute what chosen queries attend to, of the first image of the batch, on the CPU.

    ``args`` and ``kwargs`` are what the module was called with.
    """
    call = dict(zip(inspect.signature(module.forward).parameters, args), **kwargs)
    query = call['query']
    value = query if call.get('value') is None else call['value']
    if call.get('query_pos') is not None:
        query = query + call['query_pos']
    if not module.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    count, sizes = query.shape[1], level_sizes(call['spatial_shapes'])
    chosen = choose(count).to(query.device)
    query, points = query[:1, chosen], call['reference_points'][:1, chosen]
    mask, levels = call.get('key_padding_mask'), call.get('levels')
    mask = None if mask is None else mask[:1]
    # mmcv's class has all that the methods of ours need.
    kind = type(module) if isinstance(module, SamplingAttention) else DeformableAttention
    with torch.no_grad():
        locations = kind.locate(module, query, points, sizes, levels)[0].float()
        logits = kind.logits(module, query, value[:1], mask, points, sizes, levels)[0].float()
        weights = logits.softmax(-1).unflatten(-1, (len(sizes), -1))
    return AttentionMap(chosen.cpu(), count, locations.cpu(), weights.cpu(), list(sizes))


@contextmanager
def record_attention(
    model: nn.Module, choices: Mapping[str, Choose]
) -> Iterator[dict[str, AttentionMap]]:
    """Catch the attention of modules of a model while they run in the ``with`` block.

    ``choices`` has for the name of a deformable attention, such as ``encoder.layers.5.self_attn``,
    which of its queries to look at. What it yields is filled as the modules run; a later run
    replaces an earlier one. ValueError where a name is not that of a deformable attention.
    """
    known, maps = deformable_attentions(model), {}
    with ExitStack() as hooks:
        for name, choose in choices.items():
            if name not in known:
                raise ValueError(f'{name} is no deformable attention; there are {", ".join(known)}')

            def catch(module, args, kwargs, name=name, choose=choose) -> None:
                maps[name] = attention_map(module, args, kwargs, choose)

            # Before the module runs: what it is called with may be overwritten later.
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(catch, with_kwargs=True))
        yield maps


def deformable_attentions(model: nn.Module) -> list[str]:
    """Names of the deformable attentions in a model, in order."""
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, MultiScaleDeformableAttention)]


def level_masses(model: nn.Module, run: Run, tokens_per_level: int = 256) -> Tensor:
    """How the attention of the encoder is spread over the levels, on the image that ``run`` runs.

    Of each level ``tokens_per_level`` queries are looked at, evenly spread.

    Returns:
        Tensor: Share of the attention, mean over queries and heads, shape (layers, L, L): layer,
        level of the query, level of the points. NaN where a layer has no queries of that level.
    """
    at = encoder_name(model)
    encoder = model.get_submodule(at)
    levels: dict[int, Tensor] = {}  # layer -> level of each chosen query
    read: dict[int, Sequence[int]] = {}  # layer -> levels that it reads

    def choose(layer: int, num_queries: int) -> Tensor:
        level_of, read[layer] = _levels(encoder, layer, level_sizes(call['spatial_shapes']))
        own = [(level_of == level).nonzero()[:, 0] for level in level_of.unique()]
        few = [torch.linspace(0, len(o) - 1, min(len(o), tokens_per_level)).long() for o in own]
        chosen = torch.cat([queries[places] for queries, places in zip(own, few)])
        levels[layer] = level_of[chosen]
        return chosen

    names = [f'{at}.layers.{layer}.self_attn' for layer in range(len(encoder.layers))]
    choices = {name: partial(choose, layer) for layer, name in enumerate(names)}
    with called_with(encoder) as call, record_attention(model, choices) as maps:
        run()
    num_levels = len(call['spatial_shapes'])
    masses = torch.full((len(names), num_levels, num_levels), float('nan'))
    for layer, name in enumerate(names):
        for level in levels[layer].unique():
            mass = maps[name].level_mass()[levels[layer] == level].mean(0)
            masses[layer, level] = 0
            masses[layer, level, list(read[layer])] = mass
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

    def choose(num_queries: int) -> Tensor:
        nonlocal level
        sizes = level_sizes(encoder_call['spatial_shapes'])
        level_of, _ = _levels(encoder, layer, sizes)
        if level is None:
            level = int(level_of.bincount().argmax())
        height, width = sizes[_index('level', level, len(sizes), least=0)]
        image_height, image_width = call['data_samples'][0].ori_shape[:2]
        if not (0 <= point[0] < image_width and 0 <= point[1] < image_height):
            raise ValueError(
                f'point {point} is outside the image of {image_width}x{image_height} pixels '
                '(width x height)'
            )
        own = (level_of == level).nonzero()[:, 0]  # row by row
        if not len(own):
            raise ValueError(
                f'encoder layer {layer} does not update level {level}; choose another of either'
            )
        x, y = (p / s for p, s in zip(point, _scale(call)))
        return own[int(y * height) * width + int(x * width), None]

    attention = f'{at}.layers.{layer}.self_attn'
    recording = record_attention(model, {attention: choose})
    with called_with(model) as call, called_with(encoder) as encoder_call, recording as maps:
        run()
    where = f'encoder layer {layer + 1}, token of level {level + 1}'
    return QueryAttention(where, maps[attention], _scale(call), point=point)


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
    attention = f'decoder.layers.{layer}.cross_attn'
    recording = record_attention(model, {attention: torch.arange})
    head = model.get_submodule('bbox_head')
    with keep_outputs([head]) as scores, called_with(model) as call, recording as maps:
        found = run().pred_instances
    _index('object', rank, len(found), least=0)
    logits = scores[0][-1][0]  # last layer, first image
    # The head ranks (query, class) pairs by score, so the rank leads back to the query.
    query = int(logits.flatten().topk(rank + 1).indices[rank] // logits.shape[1])
    label = class_name(model.dataset_meta['classes'], found.labels[rank])
    where = f'decoder layer {layer + 1}, {label} {found.scores[rank]:.2f}'
    own = ('queries', 'locations', 'weights')
    seen = maps[attention]
    seen = replace(seen, **{name: getattr(seen, name)[[query]] for name in own})
    return QueryAttention(where, seen, _scale(call), box=tuple(found.bboxes[rank].tolist()))


def class_name(names: Sequence[str], label: Tensor) -> str:
    """The name of a label, its number where there is none."""
    return names[label] if label < len(names) else f'class {label}'


def _levels(
    encoder: nn.Module, layer: int, sizes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Sequence[int]]:
    """The level of every query of an encoder layer, int64, shape (Q,), and the levels it reads."""
    levels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes).prod(1))
    if not isinstance(encoder, InterleavedEncoder):  # a stock one
        return levels, range(len(sizes))
    tokens = encoder.step_tokens(layer, sizes)
    return tokens.pick(levels[None])[0], tokens.read or range(len(sizes))


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
