"""Random calls of the registered operators, most of which do not fit together.

Each must either be refused with an exception or compute what the reference computes. What it may
not do is read or write beyond a tensor: ``tests/helpers/fuzz_sanitized.sh`` runs this file under
AddressSanitizer, where that ends the process.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from mmlite.ops import operator, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.float64: 1e-9,
}
_SHAPES = 'spatial_shapes'
_MASK = 'output_mask'
_POINTS = ('reference_points', 'sampling')


def random_call(rng: random.Random) -> tuple[str, dict]:
    """A call that fits: name of the operator, and its arguments by name in their order."""
    dtype = rng.choice(_DTYPES)
    levels, points = rng.randint(1, 3), rng.choice((1, 2, 4, 7, 17))
    from_offsets = rng.random() < 0.5
    # Half precision often puts a point just where a gradient jumps. Then reference and kernel must
    # find the same location, which they work out each in its own way: exact with powers of two.
    exact = from_offsets and dtype in (torch.bfloat16, torch.float16)
    sizes = [rng.choice((1, 2, 4)) if exact else rng.randint(1, 6) for _ in range(2 * levels)]
    tokens = sum(h * w for h, w in zip(sizes[::2], sizes[1::2]))
    batch, queries, heads = rng.randint(0, 2), rng.choice((0, 1, 3, 70)), rng.randint(1, 3)
    dim = rng.choice((1, 3, 8, 16, 17, 32, 40))
    generator = torch.Generator().manual_seed(rng.getrandbits(32))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def points_dtype() -> torch.dtype:
        return dtype if rng.random() < 0.5 or dtype == torch.float64 else torch.float32

    shape = (batch, queries, heads, levels, points)
    arguments = dict.fromkeys(('query', 'key', 'value', _SHAPES, *_POINTS, 'attention_weights'))
    arguments |= {'value': normal(batch, tokens, heads, dim), _SHAPES: sizes}
    if from_offsets:
        count = (rng.choice((1, batch)), queries, levels, rng.choice((2, 4)))
        reference_points = torch.rand(count, generator=generator) * 1.2 - 0.1
        offsets = torch.randn(
            batch, queries, heads, rng.choice((1, levels)), points, 2, generator=generator
        )
        arguments['reference_points'] = reference_points.to(points_dtype())
        arguments['sampling'] = offsets.to(points_dtype())
    else:
        locations = torch.rand(*shape, 2, generator=generator)
        arguments['sampling'] = (locations * 1.6 - 0.3).to(points_dtype())
    if rng.random() < 0.5:
        arguments['attention_weights'] = torch.rand(shape, generator=generator).to(points_dtype())
    else:
        arguments['query'] = normal(batch, queries, heads, dim)
        if rng.random() < 0.5:
            arguments['key'] = normal(batch, tokens, heads, dim)
    if rng.random() < 0.5:
        return 'deform_attn', arguments
    return 'deform_attn_backward', {
        'grad_output': normal(batch, queries, heads * dim),
        **arguments,
        _MASK: [rng.random() < 0.7 for _ in range(6)],
    }


def _cut(rng: random.Random, tensor: Tensor) -> Tensor:
    axis = rng.randrange(max(tensor.dim(), 1))
    if tensor.dim() == 0 or tensor.shape[axis] == 0:
        return tensor
    return tensor.narrow(axis, 0, rng.randrange(tensor.shape[axis]))


def _grow(rng: random.Random, tensor: Tensor) -> Tensor:
    axis = rng.randrange(max(tensor.dim(), 1))
    return torch.cat([tensor, tensor], axis) if tensor.dim() else tensor


def _spoil(rng: random.Random, tensor: Tensor) -> Tensor:
    """Numbers that are none, or far away."""
    if not tensor.numel() or not tensor.is_floating_point() or tensor.is_meta:
        return tensor
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    flat = tensor.view(-1)
    for _ in range(rng.randint(1, 3)):
        flat[rng.randrange(len(flat))] = rng.choice(
            (float('nan'), float('inf'), -float('inf'), 3e4)
        )
    return tensor


# What may happen to a tensor. The last ones change only how it lies in memory, or its numbers.
_TENSOR_CHANGES: tuple[Callable[[random.Random, Tensor], Tensor | None], ...] = (
    _cut,
    _grow,
    lambda rng, t: t.to(rng.choice((*_DTYPES, torch.int64, torch.complex64, torch.bool))),
    lambda rng, t: t.to('meta'),
    lambda rng, t: t.unsqueeze(rng.randint(0, t.dim())),
    lambda rng, t: t[0] if t.dim() and t.shape[0] else t,
    lambda rng, t: t.flatten(),
    lambda rng, t: t.new_empty(0),
    lambda rng, t: None,
    lambda rng, t: t.transpose(*rng.sample(range(t.dim()), 2)) if t.dim() > 1 else t,
    lambda rng, t: t.narrow(-1, 0, 1).expand_as(t) if t.dim() and t.shape[-1] else t,
    lambda rng, t: t.flip(-1).contiguous().flip(-1) if t.dim() else t,
    lambda rng, t: torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() else t,
    _spoil,
    _spoil,
)
_SIZE_CHANGES: tuple[Callable[[random.Random, list[int]], list[int]], ...] = (
    lambda rng, sizes: sizes[: rng.randrange(len(sizes))],
    lambda rng, sizes: sizes + [1] * rng.randint(1, 3),
    lambda rng, sizes: [-size for size in sizes],
    lambda rng, sizes: [0, *sizes[1:]],
    lambda rng, sizes: [rng.choice((2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**63))), *sizes[1:]],
    lambda rng, sizes: [2**32, 2**32, *sizes[2:]],
    lambda rng, sizes: [size + rng.randint(-1, 1) for size in sizes],
    lambda rng, sizes: rng.sample(sizes, len(sizes)),
)


def change(rng: random.Random, arguments: dict) -> str:
    """Change one argument, and say which."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    if name == _SHAPES:
        arguments[name] = rng.choice(_SIZE_CHANGES)(rng, value) if value else [1]
    elif name == _MASK:
        arguments[name] = value[: rng.randrange(len(value) + 1)] + [True] * rng.randint(0, 2)
    elif value is not None:
        function = rng.choice(_TENSOR_CHANGES)
        # Only of features and locations is it said what NaN and infinities become.
        if function is not _spoil or name not in ('grad_output', 'attention_weights'):
            arguments[name] = function(rng, value)
    return name


def expected_of(name: str, arguments: dict) -> list[Tensor | None]:
    """What the reference computes: the output, or the gradients that are wanted."""
    arguments = dict(arguments)
    sizes = arguments[_SHAPES]
    arguments[_SHAPES] = list(zip(sizes[::2], sizes[1::2]))
    function = reference.deform_attn
    if name == 'deform_attn':
        return [function(*arguments.values())]
    grad_output, mask = arguments.pop('grad_output'), arguments.pop(_MASK)
    inputs = {n: t.detach().requires_grad_() for n, t in arguments.items() if isinstance(t, Tensor)}
    output = function(*{**arguments, **inputs}.values())
    grads = torch.autograd.grad(output, list(inputs.values()), grad_output, allow_unused=True)
    by_name = {
        n: torch.zeros_like(t) if grad is None else grad
        for (n, t), grad in zip(inputs.items(), grads)
    }
    order = [n for n in arguments if n != _SHAPES]
    return [by_name.get(n) if wanted else None for n, wanted in zip(order, mask)]


def check_call(rng: random.Random) -> str:
    """Make one call, complain unless it is refused or right, and say which it was."""
    name, arguments = random_call(rng)
    changed = [change(rng, arguments) for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))]
    described = {
        n: (tuple(a.shape), a.dtype, a.device.type, a.stride()) if isinstance(a, Tensor) else a
        for n, a in arguments.items()
    }
    context = f'{name}({described}), changed {changed}'
    tensors = [a for a in arguments.values() if isinstance(a, Tensor)]
    try:
        actual = getattr(operator, name)(*arguments.values())
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        assert changed, f'{context} was refused: {error}'
        return 'refused'
    if any(tensor.is_meta for tensor in tensors):
        return 'computed'
    actual = [actual] if isinstance(actual, Tensor) else list(actual)
    is_place = [n in _POINTS for n in arguments if n not in ('grad_output', _SHAPES, _MASK)]
    for index, (mine, wanted) in enumerate(zip(actual, expected_of(name, arguments))):
        if wanted is None:
            assert not mine.numel(), f'{context}: result {index} was not asked for'
            continue
        assert mine.dtype == wanted.dtype and mine.shape == wanted.shape, f'{context}: {index}'
        if name == 'deform_attn_backward' and is_place[index]:
            # The liberties of Case.compare_bits_of_nonsense; the gradients of offsets and of
            # reference points are sums of what has them, and so may be anything there.
            is_sum = arguments['reference_points'] is not None
            free = wanted.isnan() & (is_sum | mine.isinf() | (mine == 0))
            wanted = torch.where(free, mine, wanted)
        tolerance = _TOLERANCE[wanted.dtype if wanted.dtype in _TOLERANCE else torch.float32]
        scale = wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else 1.0
        close = torch.isclose(
            mine, wanted, rtol=tolerance, atol=tolerance * max(float(scale), 1.0), equal_nan=True
        )
        assert close.all(), (
            f'{context}: result {index} is wrong at {(~close).nonzero()[:5].tolist()}'
        )
    return 'computed'


def fuzz(count: int, seed: int = 0) -> Counter:
    """Check ``count`` random calls; how many were refused and how many computed."""
    outcomes = Counter()
    for index in range(count):
        try:
            outcomes[check_call(random.Random(f'{seed}/{index}'))] += 1
        except Exception as error:
            raise AssertionError(f'call {index} of seed {seed}: {error}') from error
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--calls', type=int, default=20000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    print(dict(fuzz(args.calls, args.seed)))


if __name__ == '__main__':
    main()
