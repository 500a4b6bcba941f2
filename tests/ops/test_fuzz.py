"""Thousands of random calls of the registered operators, most of which do not fit together.

Each must either be refused with an exception or compute what the reference computes. What it may
not do is read or write beyond a tensor: ``tests/helpers/fuzz_sanitized.sh`` runs this file under
AddressSanitizer, where that ends the process.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from operator_cases import VARIANTS, Case
from torch import Tensor

from mmlite.ops import cpu, operator, reference

# Another number and another seed: MMLITE_FUZZ_CALLS=100000 MMLITE_FUZZ_SEED=7
CALLS = int(os.environ.get('MMLITE_FUZZ_CALLS', 3000))
SEED = int(os.environ.get('MMLITE_FUZZ_SEED', 0))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-9}
DTYPES = tuple(TOLERANCE)
TENSORS = ('query', 'key', 'value', 'reference_points', 'sampling', 'attention_weights')


def random_call(rng: random.Random) -> tuple[str, dict]:
    """A call that fits: name of the operator, and its arguments by name in their order."""
    dtype = rng.choice(DTYPES)
    levels, from_offsets = rng.randint(1, 3), rng.random() < 0.5
    # Half precision often puts a point just where a gradient jumps. Then reference and kernel must
    # find the same location, which they work out each in its own way: exact with powers of two.
    exact = from_offsets and dtype in (torch.bfloat16, torch.float16)
    sides = (1, 2, 4) if exact else range(1, 7)
    case = Case(
        rng.choice(VARIANTS),
        [(rng.choice(sides), rng.choice(sides)) for _ in range(levels)],
        batch=rng.randint(0, 2),
        queries=rng.choice((0, 1, 3, 70)),
        heads=rng.randint(1, 3),
        dim=rng.choice((1, 3, 8, 16, 17, 32, 40)),
        points=rng.choice((1, 2, 4, 7, 17)),
        dtype=dtype,
        seed=rng.getrandbits(32),
    )
    if from_offsets:
        case.from_offsets(rng.random() < 0.5, rng.random() < 0.5, rng.choice((0, 1)))
    arguments = dict(zip((*TENSORS[:3], 'spatial_shapes', *TENSORS[3:]), case.arguments))
    for name in TENSORS[3:]:
        if arguments[name] is not None and dtype != torch.float64 and rng.random() < 0.5:
            arguments[name] = arguments[name].float()
    if rng.random() < 0.5:
        return 'deform_attn', arguments
    mask = [rng.random() < 0.7 for _ in TENSORS]
    return 'deform_attn_backward', {
        'grad_output': case.grad_output,
        **arguments,
        'output_mask': mask,
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
    lambda rng, t: t.to(rng.choice((*DTYPES, torch.int64, torch.complex64, torch.bool))),
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
    if name == 'spatial_shapes':
        arguments[name] = rng.choice(_SIZE_CHANGES)(rng, value) if value else [1]
    elif name == 'output_mask':
        arguments[name] = value[: rng.randrange(len(value) + 1)] + [True] * rng.randint(0, 2)
    elif value is not None:
        function = rng.choice(_TENSOR_CHANGES)
        # Only of features and locations is it said what NaN and infinities become.
        if function is not _spoil or name not in ('grad_output', 'attention_weights'):
            arguments[name] = function(rng, value)
    return name


def expected_of(name: str, arguments: dict) -> list[Tensor | None]:
    """What the reference computes: the output, or the gradients that are wanted."""
    sizes = arguments['spatial_shapes']
    leaves = {n: t for n in TENSORS if (t := arguments[n]) is not None}
    leaves = {n: tensor.detach().requires_grad_() for n, tensor in leaves.items()}
    tensors = [leaves.get(n) for n in TENSORS]
    pairs = list(zip(sizes[::2], sizes[1::2]))
    output = reference.deform_attn(*tensors[:3], pairs, *tensors[3:])
    if name == 'deform_attn':
        return [output.detach()]
    grads = torch.autograd.grad(
        output, leaves.values(), arguments['grad_output'], materialize_grads=True
    )
    by_name = dict(zip(leaves, grads))
    return [
        by_name.get(n) if wanted else None for n, wanted in zip(TENSORS, arguments['output_mask'])
    ]


def check_call(rng: random.Random) -> str:
    """Make one call, complain unless it is refused or right, and say which it was."""
    name, arguments = random_call(rng)
    changed = [change(rng, arguments) for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))]
    described = {
        n: (tuple(a.shape), a.dtype, a.device.type, a.stride()) if isinstance(a, Tensor) else a
        for n, a in arguments.items()
    }
    context = f'{name}({described}), changed {changed}'
    try:
        actual = getattr(operator, name)(*arguments.values())
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        assert changed, f'{context} was refused: {error}'
        return 'refused'
    if any(isinstance(a, Tensor) and a.is_meta for a in arguments.values()):
        return 'computed'
    actual = [actual] if isinstance(actual, Tensor) else list(actual)
    for result, mine, wanted in zip(TENSORS, actual, expected_of(name, arguments)):
        if wanted is None:
            assert not mine.numel(), f'{context}: {result} was not asked for'
            continue
        assert mine.dtype == wanted.dtype and mine.shape == wanted.shape, f'{context}: {result}'
        if result in ('reference_points', 'sampling'):
            # The liberties of Case.compare_bits_of_nonsense; the gradients of offsets and of
            # reference points are sums of what has them, and so may be anything there.
            is_sum = arguments['reference_points'] is not None
            free = wanted.isnan() & (is_sum | mine.isinf() | (mine == 0))
            wanted = torch.where(free, mine, wanted)
        finite = wanted[wanted.isfinite()].abs()
        rtol = TOLERANCE[wanted.dtype]
        atol = rtol * max(finite.max().item() if finite.numel() else 1.0, 1.0)
        close = torch.isclose(mine, wanted, rtol=rtol, atol=atol, equal_nan=True)
        assert close.all(), f'{context}: {result} is wrong at {(~close).nonzero()[:5].tolist()}'
    return 'computed'


@pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
def test_random_calls_are_refused_or_right():
    outcomes = Counter()
    for index in range(CALLS):
        try:
            outcomes[check_call(random.Random(f'{SEED}/{index}'))] += 1
        except Exception as error:
            raise AssertionError(f'call {index} of seed {SEED}: {error}') from error
    # The fuzzer itself must do both.
    assert outcomes['refused'] > CALLS / 5 and outcomes['computed'] > CALLS / 5, outcomes
