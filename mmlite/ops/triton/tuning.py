"""The choice of a launch configuration: a rule, and timings that may beat it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar('Result')

_tuned: dict[Hashable, Config] = {}


class Config(NamedTuple):
    """How the queries are spread over programs.

    Attributes:
        block_q (int): Queries of a program.
        num_warps (int): Warps of a program.
    """

    block_q: int
    num_warps: int


@functools.cache
def candidates(points: int, dim: int) -> tuple[Config, ...]:
    """The configurations worth timing for tiles of (points, block_q, dim); the first is the rule.

    A thread holds 16 or 32 elements of a tile. With 32 the points' coordinates are worked out once
    a point and passed round, with 16 by every thread that needs them, but more warps fit. Programs
    of several warps share a first-level cache among more neighbouring queries.
    """
    found = []
    for elements, num_warps in ((16, 4), (32, 1), (32, 4), (16, 8), (16, 2), (16, 1)):
        block_q = max(1, elements * 32 * num_warps // (points * dim))
        config = Config(block_q, num_warps)
        if config not in found:
            found.append(config)
    return tuple(found)


def tuned(run: Callable[[Config], Result], key: Hashable, configs: Sequence[Config]) -> Result:
    """``run`` with the fastest configuration, timed at the first call with ``key``.

    ``run`` must be free of side effects. The rule ``configs[0]`` is used where runs must repeat
    bit for bit (deterministic algorithms), where ``MMLITE_AUTOTUNE=0`` forbids timing, and as long
    as timing is impossible: during the capture of a CUDA graph, or off the GPU.
    """
    if torch.are_deterministic_algorithms_enabled():
        return run(configs[0])
    if key not in _tuned and _may_time():
        from triton.testing import do_bench

        def milliseconds(config: Config) -> float:
            return do_bench(lambda: run(config), warmup=5, rep=20, return_mode='median')

        _tuned[key] = min(configs, key=milliseconds)
    return run(_tuned.get(key, configs[0]))


def _may_time() -> bool:
    return (
        os.environ.get('MMLITE_AUTOTUNE', '1') != '0'
        and torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
    )
