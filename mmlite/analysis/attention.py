"""Where a deformable attention looks and how much each point weighs.

The operators return neither. What a module was called with is caught by a hook, and locations and
weights are computed once more for the few queries that are to be seen, whichever backend has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ..nn import StepTokens
from ..nn.attention import DeformableAttention, SamplingAttention
from ..openmmlab.families import encoder_name
from ..openmmlab.layers import level_sizes
from .complexity import called_with

# Positional parameters of mmcv's forward, in order.
_PARAMETERS = (
    *('query', 'key', 'value', 'identity', 'query_pos', 'key_padding_mask'),
    *('reference_points', 'spatial_shapes', 'level_start_index'),
)
# Given the number of queries, which of them to look at.
Choose = Callable[[int], Tensor]


@dataclass(frozen=True)
class AttentionMap:
    """What some queries of one image attend to."""

    queries: Tensor  # their indices among the queries of the module, int64, shape (Q,)
    num_queries: int  # how many queries the module had
    locations: Tensor  # normalised (x, y), float32, shape (Q, M, L, P, 2)
    weights: Tensor  # sum to 1 over levels and points, float32, shape (Q, M, L, P)
    spatial_shapes: list[tuple[int, int]]  # (h, w) of every level

    def level_mass(self) -> Tensor:
        """Share of the attention that goes to each level, mean over heads, shape (Q, L)."""
        return self.weights.sum(-1).mean(1)


def attention_map(
    module: MultiScaleDeformableAttention, args: tuple, kwargs: Mapping, choose: Choose
) -> AttentionMap:
    """Compute locations and weights of chosen queries from what the module was called with.

    ``args`` and ``kwargs`` are those of the call. The map is of the first image of the batch, on
    the CPU.
    """
    call = {**dict(zip(_PARAMETERS, args)), **kwargs}
    query = call['query']
    value = query if call.get('value') is None else call['value']
    if call.get('query_pos') is not None:
        query = query + call['query_pos']
    if not module.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    chosen = choose(query.shape[1]).to(query.device)
    mask, sizes = call.get('key_padding_mask'), level_sizes(call['spatial_shapes'])
    points = call['reference_points'][:1, chosen]
    # mmcv's class has all that the methods of ours need.
    kind = type(module) if isinstance(module, SamplingAttention) else DeformableAttention
    with torch.no_grad():
        mask = None if mask is None else mask[:1]
        locations = kind.locate(module, query[:1, chosen], points, sizes)
        logits = kind.logits(module, query[:1, chosen], value[:1], mask, points, sizes)
        weights = logits[0].float().softmax(-1).unflatten(-1, (module.num_levels, -1))
    return AttentionMap(
        chosen.cpu(), query.shape[1], locations[0].float().cpu(), weights.cpu(), list(sizes)
    )


@contextmanager
def record_attention(
    model: nn.Module, choices: Mapping[str, Choose]
) -> Iterator[dict[str, AttentionMap]]:
    """Catch the attention of modules while they run in the ``with`` block.

    Args:
        model (nn.Module): What will run.
        choices (Mapping[str, Callable[[int], Tensor]]): Name of a deformable attention in the
            model, such as ``encoder.layers.5.self_attn`` -> which of its queries to look at.

    Yields:
        dict[str, AttentionMap]: Filled as the modules run; a later run replaces an earlier one.

    Raises:
        ValueError: A name is not that of a deformable attention.
    """
    known = deformable_attentions(model)
    maps: dict[str, AttentionMap] = {}

    def watch(name: str, choose: Choose):
        # Before the module runs: what it is called with may be overwritten later.
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            maps[name] = attention_map(module, args, kwargs, choose)

        return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    for name in choices:
        if name not in known:
            raise ValueError(f'{name} is no deformable attention; there are {", ".join(known)}')
    with ExitStack() as hooks:
        for name, choose in choices.items():
            hooks.enter_context(watch(name, choose))
        yield maps


def deformable_attentions(model: nn.Module) -> list[str]:
    """Names of the deformable attentions in a model, in order."""
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, MultiScaleDeformableAttention)]


def level_masses(
    model: nn.Module, run: Callable[[], object], tokens_per_level: int = 256
) -> Tensor:
    """How the attention of the encoder is spread over the levels, on one image.

    ``run`` runs the detector on it. Of each level ``tokens_per_level`` queries are looked at,
    evenly spread.

    Returns:
        Tensor: Share of the attention, mean over queries and heads, shape (layers, L, L): encoder
        layer, level of the query, level of the sampled points. NaN where a layer has no queries
        of that level.
    """
    levels: dict[str, Tensor] = {}  # attention -> level of each chosen query
    at = encoder_name(model)
    encoder = model.get_submodule(at)
    names = [f'{at}.layers.{layer}.self_attn' for layer in range(len(encoder.layers))]

    def choose(layer: int, num_queries: int) -> Tensor:
        sizes = level_sizes(call['spatial_shapes'])
        level_of = _level_of(sizes)[_query_tokens(encoder, layer, sizes)]
        picks = []
        for level in range(len(sizes)):
            own = (level_of == level).nonzero().flatten()
            few = torch.linspace(0, len(own) - 1, min(len(own), tokens_per_level))
            picks.append(own[few.long()])
        levels[names[layer]] = level_of[torch.cat(picks)]
        return torch.cat(picks)

    choices = {name: partial(choose, layer) for layer, name in enumerate(names)}
    with called_with(encoder) as call, record_attention(model, choices) as maps:
        run()
    num_levels = len(call['spatial_shapes'])
    masses = torch.full((len(names), num_levels, num_levels), float('nan'))
    for mass, name in zip(masses, names):
        for level in levels[name].unique():
            mass[level] = maps[name].level_mass()[levels[name] == level].mean(0)
    return masses


@dataclass(frozen=True)
class QueryAttention:
    """What one query of a detector attends to, and where it is in the image."""

    name: str  # of the detector
    where: str  # which attention, in words
    attention: AttentionMap  # of the query
    scale: tuple[float, float]  # pixels of the image for a normalised location of 1, (x, y)
    point: tuple[float, float] | None = None  # the query's place in the image
    box: tuple[float, float, float, float] | None = None  # the detected object, (x1, y1, x2, y2)


def attention_at_point(
    model: nn.Module,
    run: Callable[[], object],
    point: tuple[float, float],
    *,
    name: str = '',
    layer: int = -1,
    level: int | None = None,
) -> QueryAttention:
    """What the encoder's token at a point attends to.

    ``run`` runs the detector on the image; ``point`` is (x, y) in its pixels; ``layer`` counts from
    the last where negative; ``level``, an index, is by default the largest that the layer updates.

    Raises:
        ValueError: The point is outside the image, there is no such layer or level, or the layer
            does not update that level.
    """
    at = encoder_name(model)
    encoder = model.get_submodule(at)
    layer = _layer(encoder, layer)

    def choose(num_queries: int) -> Tensor:
        nonlocal level
        sizes = level_sizes(encoder_call['spatial_shapes'])
        tokens = _query_tokens(encoder, layer, sizes)
        if level is None:
            level = int(_level_of(sizes)[tokens].bincount().argmax())
        if not 0 <= level < len(sizes):
            raise ValueError(f'level must be between 0 and {len(sizes) - 1}; got {level}')
        image_height, image_width = call['data_samples'][0].ori_shape[:2]
        if not (0 <= point[0] < image_width and 0 <= point[1] < image_height):
            raise ValueError(
                f'point {point} is outside the image of {image_width}x{image_height} pixels '
                '(width x height)'
            )
        height, width = sizes[level]
        x, y = (p / s for p, s in zip(point, _scale(call)))
        before = sum(h * w for h, w in sizes[:level])
        found = (tokens == before + int(y * height) * width + int(x * width)).nonzero()[:, 0]
        if not len(found):
            raise ValueError(
                f'encoder layer {layer} does not update level {level}; choose another layer or '
                'level'
            )
        return found

    attention = f'{at}.layers.{layer}.self_attn'
    recording = record_attention(model, {attention: choose})
    with called_with(model) as call, called_with(encoder) as encoder_call, recording as maps:
        run()
    where = f'encoder layer {layer + 1}, token of level {level + 1}'
    return QueryAttention(name, where, maps[attention], _scale(call), point=point)


def attention_of_object(
    model: nn.Module,
    run: Callable[[], DetDataSample],
    rank: int = 0,
    *,
    name: str = '',
    layer: int = -1,
) -> QueryAttention:
    """What the decoder's query of a detected object attends to.

    ``run`` runs the detector, one of ``build_detector``, on the image; ``rank`` is 0 for the object
    with the highest score; ``layer`` counts from the last where negative.

    Raises:
        ValueError: There is no such layer or object.
    """
    if not hasattr(model, 'decoder'):
        raise ValueError(
            f'the decoder of {type(model).__name__} has no deformable attention; look at a point, '
            "which is the encoder's"
        )
    layer = _layer(model.decoder, layer)
    attention = f'decoder.layers.{layer}.cross_attn'
    logits: list[Tensor] = []
    hook = model.bbox_head.register_forward_hook(
        lambda module, args, output: logits.append(output[0][-1][0])  # last layer, first image
    )
    recording = record_attention(model, {attention: torch.arange})
    with hook, called_with(model) as call, recording as maps:
        found = run().pred_instances
    if not 0 <= rank < len(found):
        raise ValueError(f'object must be between 0 and {len(found) - 1}; got {rank}')
    # The head ranks (query, class) pairs by score, so the rank leads back to the query.
    query = int(logits[0].flatten().topk(rank + 1).indices[rank] // logits[0].shape[1])
    seen, own = maps[attention], slice(query, query + 1)
    one = replace(
        seen, queries=seen.queries[own], locations=seen.locations[own], weights=seen.weights[own]
    )
    label, classes = int(found.labels[rank]), model.dataset_meta['classes']
    label = classes[label] if label < len(classes) else f'class {label}'
    where = f'decoder layer {layer + 1}, {label} {found.scores[rank]:.2f}'
    return QueryAttention(name, where, one, _scale(call), box=tuple(found.bboxes[rank].tolist()))


def _query_tokens(encoder: nn.Module, layer: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Which tokens are the queries of an encoder layer, int64, shape (Q,).

    All of them, but in a Lite encoder, whose layers may update the low- or high-level ones alone.
    """
    step = getattr(encoder.layers[layer], 'step', None)
    if step is None:
        return torch.arange(sum(height * width for height, width in sizes))
    low_levels = encoder.low_levels
    if low_levels is None:
        low_levels = encoder.schedule.low_levels(sizes)
    return StepTokens(step, sizes, low_levels).indices()


def _level_of(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The level of every token, int64."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor([h * w for h, w in sizes]))


def _layer(part: nn.Module, layer: int) -> int:
    layers = len(part.layers)
    if not -layers <= layer < layers:
        raise ValueError(f'layer must be between 0 and {layers - 1}; got {layer}')
    return layer % layers


def _scale(call: dict) -> tuple[float, float]:
    """Pixels of the image for a normalised location of 1, (x, y)."""
    meta = call['data_samples'][0].metainfo
    height, width = meta['batch_input_shape']
    factor = meta.get('scale_factor', (1.0, 1.0))
    return width / factor[0], height / factor[1]
