"""The deformable attention of any repository, found by its structure, on :mod:`mmlite.ops`.

A module that has the layers of deformable attention, and computes with them what it should, becomes
an instance of a subclass of its own class: names, hooks, pickling and the way back stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.attention import SamplingAttention
from .changes import LOG, changing, reasons
from .trial import Call, is_same, not_tried, run, trial_copy

# The layers of a deformable attention, by the names that all repositories have from the first one.
PROJECTIONS = ('sampling_offsets', 'attention_weights', 'value_proj', 'output_proj')

# Names of its channels, heads, levels and points.
_SHAPE = (
    ('d_model', 'embed_dims', 'embed_dim'),
    *((f'n_{x}', f'num_{x}') for x in ('heads', 'levels', 'points')),
)


def is_deformable_attention(module: nn.Module) -> bool:
    """Whether a module has the layers of standard deformable attention."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS)


def attention_shape(attention: nn.Module) -> tuple[int, int, int, int]:
    """Channels, heads, levels and points of a deformable attention."""
    known = vars(attention)
    channels, heads, levels, points = (known[n] for names in _SHAPE for n in names if n in known)
    return channels, heads, levels, points


def level_sizes(spatial_shapes: Tensor | Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The (h, w) of every level as Python ints.

    Reading a tensor on a GPU waits for the device. So it happens once for a tensor, and not at all
    where the model has called :func:`remember_level_sizes`.
    """
    if isinstance(spatial_shapes, Tensor):
        if getattr(spatial_shapes, '_level_sizes', None) is None:
            remember_level_sizes(spatial_shapes, spatial_shapes.tolist())
        return spatial_shapes._level_sizes  # type: ignore[attr-defined]
    sizes = [(height, width) for height, width in spatial_shapes]
    if torch.jit.is_tracing():  # where sizes are tensors, which no operator takes
        sizes = [(int(height), int(width)) for height, width in sizes]
    return tuple(sizes)


def remember_level_sizes(spatial_shapes: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    """Tell :func:`level_sizes` what a tensor (num_levels, 2) holds, so that it need not be read."""
    spatial_shapes._level_sizes = level_sizes(sizes)  # type: ignore[attr-defined]


def as_wide(tensor: Tensor, other: Tensor) -> Tensor:
    """In the dtype that a sum of both has: many make reference points in float32 in any model."""
    return tensor.to(torch.promote_types(tensor.dtype, other.dtype))


# ------------------------------------------------------------------------- classes made at run time


class Fused:
    """What classes that are made at run time have in common: how their instances are pickled."""

    made_by: tuple  # a function and its arguments, which make the class again

    def __reduce__(self):
        return _empty, self.made_by, self.__dict__


def _empty(make: Callable, *arguments: Any) -> nn.Module:
    made = make(*arguments)
    return made.__new__(made)


def _decorated_like(function: Any, new: Callable) -> Callable:
    """A function in the same decorators as another one, such as one that casts under autocast."""
    inner = getattr(function, '__wrapped__', None)
    if inner is None:
        return new
    new, cells = _decorated_like(inner, new), function.__closure__ or ()
    if not any(cell.cell_contents is inner for cell in cells):
        raise ValueError('its forward is wrapped in a way that mmlite does not know')
    cells = tuple(CellType(new) if cell.cell_contents is inner else cell for cell in cells)
    return FunctionType(function.__code__, function.__globals__, closure=cells)


# ------------------------------------------------------------------------------ how one is served


@torch.inference_mode(False)
def serve(attention: nn.Module) -> type[nn.Module] | None:
    """The class by which an attention runs on our operators; a ValueError if a trial fails."""
    if not is_deformable_attention(attention):
        return None
    stock, known = type(attention), {*PROJECTIONS}
    call, fused = Call.of(stock.forward), _fused_class(stock)
    if 'identity' in call.names:
        known.add('dropout')
    # A trial does not see what is done in training alone.
    names = inspect.unwrap(stock.forward).__code__.co_names
    if 'training' in names or not known >= {name for name, _ in attention.named_children()}:
        raise ValueError('it has more parts than deformable attention, or is another in training')
    if 'forward' in vars(attention):
        raise ValueError('its forward was replaced in this instance alone')
    trial, swaps = trial_copy(attention), not getattr(attention, 'batch_first', True)
    problems = []
    for xy in (2, 4):  # an encoder's attention may know no boxes
        arguments = call.draw(trial, attention_shape(trial), swaps, xy)
        try:
            theirs = run(trial, arguments, trial.parameters())
        except Exception as error:  # whatever a stranger's code raises
            problems.append(not_tried(error))
            continue
        if not is_same(run(partial(fused.forward, trial), arguments, trial.parameters()), theirs):
            raise ValueError('it computes something else than multi-scale deformable attention')
    if len(problems) > 1:
        raise ValueError(problems[0])
    return fused


@cache
def _fused_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an attention's class that runs on our operators."""
    call = Call.of(stock.forward)

    def forward(self, *args, **kwargs):
        known, unknown = call.read(args, kwargs)
        # On other devices there may be kernels of theirs.
        if unknown or not (known['query'].is_cpu or known['query'].is_cuda):
            return inspect.unwrap(stock.forward)(self, *args, **kwargs)
        return _attend(self, known, 'identity' in call.names)

    members = {'forward': _decorated_like(stock.forward, forward), 'made_by': (_fused_class, stock)}
    return type(f'Fused{stock.__name__}', (Fused, stock), members)


def _attend(self: Any, known: dict[str, Any], adds_identity: bool) -> Tensor:
    """Standard attention with the layers of a stock module, of arguments by their meaning."""
    query, points, sizes = (known[name] for name in ('query', 'points', 'sizes'))
    value, pos, mask, identity = map(known.get, ('value', 'pos', 'mask', 'identity'))
    value = query if value is None else value
    identity = query if identity is None else identity
    query = query if pos is None else query + pos
    swaps = not getattr(self, 'batch_first', True)
    if swaps:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    _, heads, levels, number = attention_shape(self)
    value = self.value_proj(value)
    if mask is not None:
        value = value.masked_fill(mask[..., None], 0.0)
    weights = self.attention_weights(query).unflatten(-1, (heads, -1)).softmax(-1)
    offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, number, 2))
    output = ops.ms_deform_attn_from_offsets(
        value.unflatten(-1, (heads, -1)),
        level_sizes(sizes),
        as_wide(points, offsets).expand(-1, -1, levels, -1),
        offsets,
        weights.unflatten(-1, (levels, number)),
    )
    output = self.output_proj(output)
    output = output.transpose(0, 1) if swaps else output
    return self.dropout(output) + identity if adds_identity else output


def fuse(
    model: nn.Module, serve: Callable[[nn.Module], type[nn.Module] | None] = serve
) -> nn.Module:
    """Run a model's deformable attention on our operators; see :func:`mmlite.fuse`.

    Args:
        model (nn.Module): Changed in place.
        serve (Callable): Gives the class by which a module runs on our operators, None for what is
            no attention. A ValueError says why one cannot be served.

    Returns:
        nn.Module: The same model. The log names what was left as it was, and why.

    Raises:
        ValueError: Nothing could be served; the message says why.
    """
    found, left, has_ours = {}, {}, False
    for name, part in model.named_modules():
        try:
            if isinstance(part, (Fused, SamplingAttention)):
                has_ours = True
            elif fused := serve(part):
                found[name] = fused
        except ValueError as error:
            left[name or 'it'] = str(error)
    if not found and not has_ours:
        why = reasons(left) or f'no module of it has layers {", ".join(PROJECTIONS)}'
        kind = type(model).__name__
        raise ValueError(f'{kind} has no deformable attention that mmlite.ops can serve: {why}')
    with changing(model, 'fuse') as change:
        for name, fused in found.items():
            change.set(model, name, '__class__', fused)
    LOG.info('fuse: %d deformable attentions run on mmlite.ops', len(found))
    if left:
        LOG.warning('fuse: left as it is: %s', reasons(left))
    return model
