"""A starting point for a Lite detector from the trained weights of its stock detector.

Whatever has a counterpart in the stock detector is copied. What is new is fitted, layer by layer
and without gradients, to what the stock detector computes on a few images:

- the query projection of key-aware attention, so that its logits come close to those that the stock
  attention predicts from the query alone (weighted least squares, solved by L-BFGS);
- the small FFN, made of those hidden units of the stock FFN that contribute most, with an output
  layer that least squares solves for. Its target is the stock encoder's token at the same depth, so
  it also makes up for the updates that the schedule leaves out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import ConfigDict
from torch import Tensor, nn

from ...models import copy_counterparts
from ...nn import DeformableAttention
from ...nn.schedule import stock_layers
from ...ops.reference import sample
from ..detectors.grounding_dino import adapt_bert
from ..families import encoder_name, find_holder, reads_text
from ..layers import KeyAwareDeformableAttention, level_sizes
from ..lite_config import stock_config

# Tokens that a fit looks at; more change nothing that can be seen.
_TOKENS = 4096


@dataclass(frozen=True)
class Agreement:
    """How close a Lite detector is to its stock detector on some images.

    ``found`` asks for the 20 best detections of each image, by their class and an IoU of at least
    0.5. It and ``score`` are None where the two have other classes, or give semantic maps.
    """

    memory: float  # norm of the difference of the encoders' outputs, relative to the stock's
    found: float | None  # share of the stock detector's detections that the Lite one has, too
    score: float | None  # mean difference of the scores of those that were found


@dataclass(frozen=True)
class WarmStart:
    """What :func:`warm_start` did."""

    copied: list[str]  # entries that are the stock detector's
    fitted: list[str]  # entries that were fitted to it
    unused: list[str]  # entries of the stock detector that the Lite one has no place for
    copied_only: Agreement  # with the fitted entries still at their usual random start
    result: Agreement
    # Left at their random start: the stock detector's are for other classes or queries.
    fresh: list[str]

    def __str__(self) -> str:
        before, after = self.copied_only, self.result
        text = (
            f'{len(self.copied)} entries copied, {len(self.fitted)} fitted; encoder output within '
            f'{after.memory:.1%} of the stock detector ({before.memory:.1%} before the fit)'
        )
        if self.fresh:
            return (
                f'{text}; {len(self.fresh)} entries start at random, as the weights have another '
                f'number of classes or queries: {", ".join(self.fresh)}'
            )
        if after.found is None:
            return text
        return (
            f'{text}, {after.found:.1%} of its detections found ({before.found:.1%}), scores '
            f'within {after.score:.3f}'
        )


@torch.no_grad()
def warm_start(
    model: nn.Module,
    model_config: ConfigDict,
    stock_state: Mapping[str, Tensor],
    data: dict,
) -> WarmStart:
    """Turn trained stock weights into a starting point for a Lite detector, in place.

    Args:
        model (nn.Module): The Lite detector, initialised.
        model_config (ConfigDict): Its config.
        stock_state (Mapping[str, Tensor]): State dict of the trained stock detector.
        data (dict): Images to fit to, as the detector's data preprocessor returns them: ``inputs``
            (batch, 3, height, width) and ``data_samples``. A few images are enough.

    Returns:
        WarmStart: What was copied and fitted, and how close the two detectors are on ``data``.

    Raises:
        ValueError: If the weights are not those of the stock detector.
    """
    stock = build_teacher(model_config, stock_state).to(data['inputs'].device)
    own = stock.state_dict()
    unused = [name for name in stock_state if name not in own]
    copied, new = copy_counterparts(model, stock, encoder_name(model))
    # The offsets of an attention with same_loc have another shape, too, and are fitted.
    fresh = [name for name in new if name in own and 'sampling_offsets' not in name]
    fitted = [name for name in new if name not in fresh]
    training = model.training
    model.eval()
    # Arguments of modules: of the stock layers' last norms, and of the Lite layers.
    kept: dict[nn.Module, tuple] = {}
    norms = [layer.norms[1] for layer in _encoder(stock).layers]
    keep = [norm.register_forward_pre_hook(kept.__setitem__) for norm in norms]
    expected = _outputs(stock, data, keep)
    before = _agreement(expected, _outputs(model, data), not fresh)
    encoder = _encoder(model)
    chosen = encoder.schedule
    for schedule in sorted(encoder.schedules, key=lambda schedule: schedule.cost):
        encoder.use_schedule(schedule)  # the last, which updates most, decides where several fit
        _outputs(model, data, _fits(model, stock, kept))
    encoder.use_schedule(chosen)
    after = _agreement(expected, _outputs(model, data), not fresh)
    model.train(training)
    return WarmStart(copied, fitted, unused, before, after, fresh)


# --- The stock detector -----------------------------------------------------------------------


def build_teacher(model_config: ConfigDict, stock_state: Mapping[str, Tensor]) -> nn.Module:
    """Build the stock detector behind a Lite config, and load its trained weights.

    It has the number of classes and queries of the weights, whatever the config says.

    Args:
        model_config (ConfigDict): ``model`` of the Lite config; it is not changed.
        stock_state (Mapping[str, Tensor]): State dict of the trained stock detector. Entries that
            the stock detector has no place for are left out.

    Returns:
        nn.Module: The stock detector on the CPU, in eval mode.

    Raises:
        ValueError: The config is not of a Lite model, or the weights are not those of its stock
            detector.
    """
    stock = MODELS.build(_teacher_config(model_config, stock_state))
    if reads_text(stock):
        adapt_bert(stock.language_model)
    own = stock.state_dict()
    # A neck with biases of zero is a neck without.
    necks = [name for name in own if name.startswith('neck.') and name.endswith('.conv.bias')]
    state = {**{name: torch.zeros_like(own[name]) for name in necks}, **stock_state}
    wrong = [name for name in own if name not in state and 'num_batches' not in name]
    wrong += [name for name in own if name in state and state[name].shape != own[name].shape]
    if wrong:
        raise ValueError(
            f'the weights are not those of the {type(stock).__name__} behind this config: '
            f'{", ".join(wrong[:3])}{" ..." if len(wrong) > 3 else ""} '
            f'({len(wrong)} of {len(own)} entries) are missing or of another shape'
        )
    stock.load_state_dict(state, strict=False)
    return stock.eval()


def _teacher_config(model_config: ConfigDict, state: Mapping[str, Tensor]) -> ConfigDict:
    """The stock detector's config, with the number of classes and queries that its weights have."""
    config = stock_config(model_config)
    path, holder, family = find_holder(config)
    rows = {name: len(value) for name, value in state.items() if value.dim()}
    if path and path[-1] == 'pixel_decoder':  # Mask2Former
        test_cfg, head = config.get('test_cfg'), config[path[0]]
        head.num_queries = rows.get(f'{path[0]}.query_embed.weight', head.get('num_queries', 100))
        semantic = 'num_classes' in head
        classes = head.num_classes if semantic else head.num_things_classes + head.num_stuff_classes
        given = rows.get(f'{path[0]}.cls_embed.bias', classes + 1) - 1  # the last is no object
        if semantic:
            head.num_classes = given
        elif given != classes:
            for part in (head, config.get('panoptic_fusion_head') or {}):
                part.update(num_things_classes=given, num_stuff_classes=0)
        most = given * head.num_queries
    else:
        test_cfg, head = holder.get('test_cfg'), holder.get('bbox_head', {})
        # A class layer that compares with a text has no rows; the denoising queries' labels have.
        counted = 'dn_query_generator.label_embedding.weight'
        counted = counted if family.reads_text else 'bbox_head.cls_branches.0.bias'
        if 'num_classes' in head:
            head.num_classes = rows.get(counted, head.num_classes)
        queries = holder.get('num_queries', 300)
        embedded = rows.get('query_embedding.weight', queries)
        if family.stock == 'HDeformableDETR':
            # Weights do not show how they split; inference runs the first, the one-to-one queries.
            holder.num_one2many_queries = embedded - min(queries, embedded)
            embedded = min(queries, embedded)
        holder.num_queries = embedded
        most = embedded * (1 if family.reads_text else head.get('num_classes', 80))
    for name in {'max_per_img', 'max_per_image'} & set(test_cfg or ()):
        test_cfg[name] = min(test_cfg[name], most)
    return config


# --- Fits -------------------------------------------------------------------------------------


def _fits(model: nn.Module, stock: nn.Module, kept: dict[nn.Module, tuple]) -> Iterator:
    """Hooks that fit what is new as it is called, behind what is fitted already."""
    theirs = {}  # name of an attention in the Lite and in the stock detector, where they differ
    for index, stock_index in enumerate(stock_layers(_encoder(model).steps)):
        name = f'{encoder_name(model)}.layers.'
        theirs[f'{name}{index}.self_attn'] = f'{name}{stock_index}.self_attn'
        layer, stock_layer = _encoder(model).layers[index], _encoder(stock).layers[stock_index]
        if layer.has_small_ffn:
            yield layer.register_forward_pre_hook(kept.__setitem__)
            hook = partial(_fit_small_ffn, layer, stock_layer, kept)
            yield layer.norms[0].register_forward_hook(hook)
    for name, attention in model.named_modules():
        if isinstance(attention, KeyAwareDeformableAttention):
            hook = partial(_fit_attention, stock.get_submodule(theirs.get(name, name)))
            yield attention.register_forward_pre_hook(hook, with_kwargs=True)


def _fit_attention(
    stock: MultiScaleDeformableAttention,
    attention: KeyAwareDeformableAttention,
    args: tuple,
    kwargs: dict,
) -> None:
    """Fit the query projection to the logits of the stock attention, before the attention's call.

    The logits are linear in the projection. A softmax of logits that are off by e differs from the
    wanted weights p by a Kullback-Leibler divergence of half the variance of e under p, to second
    order; the sum of these variances is minimised.
    """
    call = {**dict(zip(('query', 'key', 'value', 'identity', 'query_pos'), args)), **kwargs}
    query, query_pos, shapes = call['query'], call.get('query_pos'), call['spatial_shapes']
    heads, head_dim = attention.num_heads, attention.embed_dims // attention.num_heads
    if attention.proj_key:
        attention.key_proj.load_state_dict(attention.value_proj.state_dict())
    if attention.same_loc:
        for name, parameter in attention.sampling_offsets.named_parameters():
            levels = getattr(stock.sampling_offsets, name)
            levels = levels.unflatten(0, (heads, attention.num_levels, -1))
            parameter.copy_(levels.mean(1).flatten(0, 1))
    projection = attention.key_proj if attention.proj_key else attention.value_proj
    keys = attention.project(projection, call['value'], call.get('key_padding_mask'))

    query = query if query_pos is None else query + query_pos
    chosen = _choose(query.shape[1], max(_TOKENS // len(query), 1)).to(query.device)
    query, reference_points = query[:, chosen], call['reference_points'][:, chosen]
    shapes = level_sizes(shapes)
    levels = call.get('levels')
    locations = attention.locate(query, reference_points, shapes, levels)
    sampled = sample(keys, shapes, locations) * head_dim**-0.5  # (B, Q, M, L*P, D)
    logits = DeformableAttention.logits(stock, query, None, None, None, None, levels)
    weights = logits.softmax(-1)
    query = torch.cat([query, torch.ones_like(query[..., :1])], -1)
    ridge = 1e-2 * (query**2).sum() * (sampled**2).mean()
    fitted = query.new_zeros(heads, head_dim, query.shape[-1]).requires_grad_()

    def loss() -> Tensor:
        projected = torch.einsum('bqc,mdc->bqmd', query, fitted)
        errors = torch.einsum('bqmd,bqmkd->bqmk', projected, sampled) - logits
        mean = (weights * errors).sum(-1, keepdim=True)
        value = (weights * (errors - mean) ** 2).sum() + ridge * (fitted**2).sum()
        (fitted.grad,) = torch.autograd.grad(value, fitted)
        return value

    torch.optim.LBFGS([fitted], max_iter=60, line_search_fn='strong_wolfe').step(loss)
    attention.query_proj.weight.copy_(fitted[..., :-1].flatten(0, 1))
    attention.query_proj.bias.copy_(fitted[..., -1].flatten())


def _choose(total: int, most: int) -> Tensor:
    """Indices of at most so many tokens, the same at every call."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:most]


def _fit_small_ffn(
    layer: nn.Module,
    stock: nn.Module,
    kept: dict[nn.Module, tuple],
    _: nn.Module,
    args: tuple,
    attended: Tensor,
) -> None:
    """Make the small FFN of the stock FFN's most useful hidden units.

    Called with what the norm behind the attention gives, which is the input of the FFN. Its output
    is to be what the stock layer gives to its last norm.
    """
    memory, _, step_tokens, mask = kept[layer][:4]
    if not any(run.is_low for run in step_tokens.queries):  # with this schedule
        return
    mask = memory.new_zeros(memory.shape[:2], dtype=torch.bool) if mask is None else mask
    valid = ~step_tokens.low(step_tokens.pick(mask))
    tokens = step_tokens.low(attended)[valid]
    target = step_tokens.low(step_tokens.pick(kept[stock.norms[1]][0]))[valid]
    layer.small_norm.load_state_dict(stock.norms[1].state_dict())
    chosen = _choose(len(tokens), 4 * _TOKENS).to(tokens.device)
    tokens, target = tokens[chosen], target[chosen]
    hidden = stock.ffn.layers[0](tokens)
    wanted = target - tokens

    first, last = layer.small_ffn.layers[0][0], layer.small_ffn.layers[1]
    stock_weight = stock.ffn.layers[1].weight.T
    weight, _ = _least_squares(hidden, wanted, stock_weight)
    contribution = hidden.pow(2).mean(0) * weight.pow(2).sum(1)
    best = contribution.topk(min(first.out_features, len(contribution))).indices
    weight, bias = _least_squares(hidden[:, best], wanted, stock_weight[best])

    for parameter in (*first.parameters(), *last.parameters()):
        parameter.zero_()
    first.weight[: len(best)] = stock.ffn.layers[0][0].weight[best]
    first.bias[: len(best)] = stock.ffn.layers[0][0].bias[best]
    last.weight[:, : len(best)] = weight.T
    last.bias.copy_(bias)


def _least_squares(features: Tensor, wanted: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (features, outputs) and bias (outputs,) of the best linear layer close to a prior."""
    mean, wanted_mean = features.mean(0), wanted.mean(0)
    features, wanted = (features - mean).double(), (wanted - wanted_mean).double()
    gram = features.T @ features
    # The fewer tokens there are to a feature, the more of what they show is chance.
    ridge = 0.2 * features.shape[1] / len(features)
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    change = torch.linalg.solve(gram, features.T @ (wanted - features @ prior.double()))
    weight = prior + change.to(prior)
    return weight, wanted_mean - mean @ weight


# --- How close --------------------------------------------------------------------------------


def _encoder(model: nn.Module) -> nn.Module:
    return model.get_submodule(encoder_name(model))


def _outputs(model: nn.Module, data: dict, hooks: Iterable = ()) -> tuple[Tensor, list]:
    """Memory and detections of every image, the boxes in pixels of the network's input.

    The hooks are removed behind the call.
    """
    memories: list = []
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        stack.enter_context(
            _encoder(model).register_forward_hook(lambda _, args, output: memories.append(output))
        )
        options = {} if hasattr(model, 'decode_head') else {'rescale': False}
        results = model.predict(data['inputs'], copy.deepcopy(data['data_samples']), **options)
    # Grounding DINO's encoder gives that of the text, too.
    memory = memories[0] if isinstance(memories[0], Tensor) else memories[0][0]
    return memory, [result.get('pred_instances') for result in results]


def _agreement(expected: tuple, actual: tuple, same_classes: bool) -> Agreement:
    memory = float((actual[0] - expected[0]).norm() / expected[0].norm())
    if not same_classes or None in expected[1]:
        return Agreement(memory, None, None)
    wanted, found = 0, []
    for stock, lite in zip(expected[1], actual[1]):
        stock = stock[stock.scores.argsort(descending=True)[:20]]
        wanted += len(stock)
        if not len(lite):  # as of a panoptic model whose objects are all too small
            continue
        overlaps = bbox_overlaps(stock.bboxes, lite.bboxes)
        overlaps[stock.labels[:, None] != lite.labels[None]] = 0
        differences = (lite.scores[None] - stock.scores[:, None]).abs()
        # Of boxes on top of each other, the one with the closer score is meant.
        best = (overlaps - 1e-3 * differences).argmax(1, keepdim=True)
        found += differences.gather(1, best)[overlaps.gather(1, best) >= 0.5].tolist()
    return Agreement(memory, len(found) / max(wanted, 1), sum(found) / max(len(found), 1))
