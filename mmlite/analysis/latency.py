"""Paired time measurements: every contestant in every round, in an order that cancels drift.

A machine warms up, throttles and gets visitors. Timing one contestant after the other books all
of that to whoever runs at the wrong moment. Here round 1 runs A B C, round 2 C B A, and so on:
over each such pair of rounds a steady drift falls on all alike, and ratios are formed pair by
pair before their median is taken.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

Call = Callable[[int], object]
Name = TypeVar('Name', bound=Hashable)


@dataclass
class Timing:
    """Seconds of one call."""

    seconds: tuple[float, ...]  # one figure a round, in their order
    median: float = field(init=False)
    mean: float = field(init=False)
    p95: float = field(init=False)

    def __post_init__(self) -> None:
        self.median, self.p95 = np.percentile(self.seconds, [50, 95]).tolist()
        self.mean = float(np.mean(self.seconds))


@dataclass(frozen=True)
class Ratio:
    """How many times faster: median over the pairs of rounds, and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 1 if self.median >= 10 else 2
        return f'{self.median:.{digits}f}x ({self.low:.{digits}f} to {self.high:.{digits}f})'


def measure(
    contestants: Mapping[Name, Call],
    *,
    rounds: int = 10,
    warmup: int = 2,
    min_seconds: float = 0.0,
    device: torch.device | str = 'cpu',
    on_step: Callable[[], None] = lambda: None,
) -> dict[Name, Timing]:
    """Time several calls against each other.

    Args:
        contestants (Mapping[Hashable, Callable[[int], object]]): Name -> what to time. It is called
            with a running number, by which it may choose among several inputs.
        rounds (int): Measurements of each contestant; an odd number is raised to the next even
            one.
        warmup (int): Calls of each contestant before anything is timed, at least one.
        min_seconds (float): Quick calls are repeated within one measurement until it takes about
            this long.
        device (torch.device | str): On CUDA, time is taken between events on the current stream;
            on the CPU from the wall clock.
        on_step (Callable[[], None]): Called after each measurement, for a progress bar.

    Returns:
        dict[Hashable, Timing]: Seconds of one call, by name.

    Raises:
        ValueError: There is nothing to measure or no round to do it in.
    """
    if not contestants or rounds < 1:
        raise ValueError('a measurement needs at least one contestant and one round')
    clock = _cuda_clock if torch.device(device).type == 'cuda' else _wall_clock
    repeats = {}
    for name, call in contestants.items():
        for index in range(max(1, warmup)):
            once = clock(call, index, 1)
        repeats[name] = max(1, round(min_seconds / max(once, 1e-9)))
        on_step()
    seconds: dict[Name, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for index in range(rounds + rounds % 2):
        for name in order:
            seconds[name].append(clock(contestants[name], index, repeats[name]))
            on_step()
        order.reverse()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def measurements(contestants: int, rounds: int) -> int:
    """How often :func:`measure` calls ``on_step``."""
    return contestants * (1 + rounds + rounds % 2)


def speedup(baseline: Timing, variant: Timing) -> Ratio:
    """How many times faster ``variant`` is than ``baseline``, both from one :func:`measure`."""
    pairs = [np.reshape(timing.seconds, (-1, 2)).sum(1) for timing in (baseline, variant)]
    low, median, high = np.percentile(pairs[0] / pairs[1], [25, 50, 75])
    return Ratio(float(median), float(low), float(high))


def _wall_clock(call: Call, index: int, repeats: int) -> float:
    start = time.perf_counter()
    for repeat in range(repeats):
        call(index * repeats + repeat)
    return (time.perf_counter() - start) / repeats


def _cuda_clock(call: Call, index: int, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for repeat in range(repeats):
        call(index * repeats + repeat)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` intra-op threads of torch, ``None`` for as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_machine(device: torch.device | str = 'cpu') -> dict[str, str]:
    """What the numbers were taken on, for the head of a report."""
    machine = {
        'CPU': f'{_cpu_name()}, {os.cpu_count()} cores visible',
        'threads': str(torch.get_num_threads()),
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'PyTorch': torch.__version__,
        'Python': platform.python_version(),
    }
    device = torch.device(device)
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        machine['GPU'] = f'{properties.name}, {properties.total_memory / 2**30:.0f} GiB'
        machine['CUDA'] = str(torch.version.cuda)
    return machine


def _cpu_name() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    return found[1] if found else platform.processor() or platform.machine()
