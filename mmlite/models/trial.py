"""Code from elsewhere: what its arguments mean, and what it gives for small random inputs.

A module that looks like a known one is believed only after a trial: its own code and ours run side
by side, in float64, on a copy with random weights. Nothing of the module itself is touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# What arguments mean, and the names that repositories give them.
_NAMES = {
    'query': 'query src',
    'value': 'value input_flatten',
    'pos': 'query_pos pos',
    'mask': 'key_padding_mask input_padding_mask padding_mask query_key_padding_mask',
    'points': 'reference_points',
    'sizes': 'spatial_shapes input_spatial_shapes value_spatial_shapes',
    'ratios': 'valid_ratios',
    'starts': 'level_start_index input_level_start_index',
    **{name: name for name in ('identity', 'key', 'key_pos', 'attn_mask', 'query_sine_embed')},
}
_TOKENS = ('query', 'value', 'pos', 'identity', 'key', 'key_pos', 'attn_mask', 'query_sine_embed')
_MEANINGS = {name: meaning for meaning, names in _NAMES.items() for name in names.split()}


class Call(NamedTuple):
    """How a method is called."""

    names: list[str]  # its arguments in their order, without self
    meanings: dict[str, str]  # of those that are known here, or may come by name
    defaults: dict[str, Any]  # of each, Parameter.empty where there is none

    @classmethod
    def of(cls, method: Callable, unknown: Iterable[str] = ()) -> Call:
        """Read a method's signature; ``unknown`` are meanings to leave out."""
        kinds = inspect.signature(method).parameters
        names = [name for name, kind in kinds.items() if kind.kind is not kind.VAR_KEYWORD][1:]
        if any(kind.kind is kind.VAR_POSITIONAL for kind in kinds.values()):
            raise ValueError('its forward does not name what it takes')
        # Arguments that a method hands on by name, all together, may be any.
        known = names if len(names) == len(kinds) - 1 else _MEANINGS
        meanings = {n: m for n, m in _MEANINGS.items() if n in known and m not in unknown}
        if 'query_key_padding_mask' in names:  # the other mask is of the keys that decoders have
            del meanings['key_padding_mask']
        if 'valid_ratios' in names and 'reference_points' not in names:  # made of the ratios
            meanings.pop('reference_points', None)
        return cls(names, meanings, {name: kinds[name].default for name in names})

    def read(self, args: Sequence, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What is given, by its meaning, and the names of what is neither known nor left out."""
        given = {**dict(zip(self.names, args)), **kwargs}
        known = {self.meanings[n]: value for n, value in given.items() if n in self.meanings}
        others = given.keys() - self.meanings
        left_out = {n for n in others if given[n] is None or given[n] is self.defaults.get(n)}
        return known, sorted(others - left_out)

    def draw(self, like: nn.Module, shape: Sequence[int], swaps: bool, xy: int = 2) -> dict:
        """Small random arguments for a module with so many channels, heads and levels.

        ``swaps``: the axis of the tokens comes first; ``xy``: numbers of a reference point.
        """
        device, generator = next(like.parameters()).device, torch.Generator().manual_seed(0)
        channels, _, levels, _ = shape
        sizes = [(levels - level + 1, levels - level + 3) for level in range(levels)]
        starts = [sum(h * w for h, w in sizes[:level]) for level in range(levels + 1)]

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device='cpu', dtype=torch.float64).to(
                device
            )

        given = {
            'points': draw(2, starts[-1], levels, xy),
            'sizes': torch.tensor(sizes, device=device),
            'starts': torch.tensor(starts[:-1], device=device),
            'mask': draw(2, starts[-1]) < 0.3,
            'ratios': 0.5 + 0.5 * draw(2, levels, 2),
        }
        for name in _TOKENS:
            tokens = draw(2, starts[-1], channels)
            given[name] = tokens.transpose(0, 1) if swaps else tokens
        # One name for each meaning, those of the signature rather than others.
        of = {m: n for n, m in reversed(self.meanings.items())}
        of.update({self.meanings[n]: n for n in self.names if n in self.meanings})
        required = [n for n, value in self.defaults.items() if value is inspect.Parameter.empty]
        return {**dict.fromkeys(required), **{n: given[m] for m, n in of.items()}}


def trial_copy(module: nn.Module) -> Any:
    """A copy in float64 without hooks, with random weights."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks):
            hooks.clear()
    if any(parameter.is_meta for parameter in copied.parameters()):
        copied.to_empty(device='cpu')
    # Compiled operators often run on GPUs alone.
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    copied.to(device, torch.float64).eval().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in copied.parameters():
            # Offsets and weights that do not depend on the query would hide differences.
            how = dict(generator=generator, device='cpu', dtype=torch.float64)
            values = torch.randn(parameter.shape, **how)
            parameter.copy_(values / (parameter.shape[-1] if parameter.dim() > 1 else 1) ** 0.5)
    return copied


def run(forward: Callable, arguments: dict[str, Any], more: Iterable[Tensor] = ()) -> Any:
    """What a forward returns, and the derivatives of a sum of it."""
    inputs = [t for t in arguments.values() if isinstance(t, Tensor) and t.is_floating_point()]
    inputs = [*(each.requires_grad_() for each in inputs), *more]
    for each in inputs:
        each.grad = None
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        result = forward(**arguments)
        output = result if isinstance(result, Tensor) else result[0]
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
        (output * weights.view(output.shape)).sum().backward()
    return result, [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]


def not_tried(error: Exception) -> str:
    """A sentence on a trial that failed, with what helps where the operator cannot run."""
    how = 'import mmlite.standins before it, where its operator is not compiled'
    return f'it could not be tried ({type(error).__name__}: {error}); {how}'


def is_same(ours: Any, theirs: Any) -> bool:
    """Whether two results are equal but for rounding."""
    if isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape == theirs.shape):
        return ours is theirs
    return bool((ours - theirs).abs().max() <= 1e-6 * max(1.0, theirs.abs().max().item()))
