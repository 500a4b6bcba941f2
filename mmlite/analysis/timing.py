"""Fair measurements: contestants take turns, so that drift of the machine falls on all alike.

Round 1 runs A B C, round 2 runs C B A, and so on. Over each such pair of rounds a steady drift
cancels; ratios are formed pair by pair before their median is taken.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

# What is timed. It gets a running number, by which it may choose among several inputs.
Call = Callable[[int], object]
# Shows progress: given a text and a number of steps, returns what to call after each step, with a
# note or without.
Start = Callable[[str, int], Callable[..., None]]
Name = TypeVar('Name', bound=Hashable)


def silent(text: str, total: int) -> Callable[[], None]:
    """A :data:`Start` that shows nothing."""
    return lambda: None


@dataclass(frozen=True)
class Ratio:
    """How many times faster: median over the pairs of rounds, and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 1 if self.median >= 10 else 2
        return f'{self.median:.{digits}f}x ({self.low:.{digits}f} to {self.high:.{digits}f})'


@dataclass
class Timing:
    """What one call costs."""

    seconds: tuple[float, ...]  # one figure a round, in their order
    memory: int | None = None  # bytes, see peak_memory
    faster: dict[str, Ratio] = field(default_factory=dict)  # than others of the same rounds
    median: float = field(init=False)
    mean: float = field(init=False)
    p95: float = field(init=False)

    def __post_init__(self) -> None:
        self.median, self.p95 = np.percentile(self.seconds, [50, 95]).tolist()
        self.mean = float(np.mean(self.seconds))


@dataclass(frozen=True)
class Setting:
    """What is run, where, and how often."""

    image_size: tuple[int, int] | None = (800, 1333)  # (h, w) in pixels; None: inputs are given
    batch_sizes: tuple[int, ...] = (1,)
    dtype: str = 'float32'  # or what autocast runs in
    device: str = 'cpu'
    rounds: int = 10  # measurements of each contestant; 0 to count only
    warmup: int = 2  # calls before, at least one
    parts: tuple[str, ...] = ('inference',)  # of the contestants, that are measured

    def describe(self, batch_size: int) -> str:
        """What is run, as the title of a table says it."""
        images = f'{"x".join(map(str, self.image_size or ()))}, batch {batch_size}'
        return f'{images if self.image_size else "the given inputs"}, {self.dtype}'

    def autocast(self) -> torch.autocast:
        """What to run a model in."""
        kind, dtype = torch.device(self.device).type, getattr(torch, self.dtype)
        return torch.autocast(kind, dtype, enabled=self.dtype != 'float32')


@dataclass(eq=False)
class Contestant:
    """What is measured: something with parts that can be called."""

    # Part -> batch size -> what was measured.
    timings: dict[str, dict[int, Timing]] = field(default_factory=dict, init=False)

    def label(self) -> dict[str, str]:
        """The first cells of its rows."""
        raise NotImplementedError

    def call(self, part: str, setting: Setting, batch_size: int) -> Call | None:
        """What is measured of a part; None where there is no such part."""
        raise NotImplementedError

    def as_json(self) -> dict:
        return {**self.label(), 'timings': self.timings}


def take_turns(
    contestants: Sequence[Contestant], setting: Setting, start: Start = silent, **how: Any
) -> None:
    """Measure every part at every batch size; fills :attr:`Contestant.timings`.

    What else is given goes to :func:`measure`.
    """
    for part, batch_size in product(setting.parts if setting.rounds else (), setting.batch_sizes):
        calls = {each: each.call(part, setting, batch_size) for each in contestants}
        calls = {each: call for each, call in calls.items() if call is not None}
        timings = measure(calls, setting, start, f'{part}, batch {batch_size}', **how)
        for each, timing in timings.items():
            each.timings.setdefault(part, {})[batch_size] = timing


def measure(
    contestants: Mapping[Name, Call],
    setting: Setting,
    start: Start = silent,
    text: str = '',
    *,
    against: Mapping[str, Callable[[Name], Name | None]] | None = None,
    min_seconds: float = 0.0,
) -> dict[Name, Timing]:
    """Measure several calls in turns: time, peak memory, and how many times faster they are.

    An odd number of rounds is raised to the next even one. ``start`` shows progress, with ``text``
    beside the bar. ``against`` has for each entry of :attr:`Timing.faster` a function from a name
    to that of the contestant to compare with. Quick calls are repeated until a measurement takes
    about ``min_seconds``. ValueError where there is nothing to measure or no round to do it in.
    """
    if not contestants or setting.rounds < 1:
        raise ValueError('a measurement needs at least one contestant and one round')
    rounds = setting.rounds + setting.rounds % 2
    step = start(text, len(contestants) * (1 + rounds))
    repeats = {}
    for name, call in contestants.items():
        for index in range(max(1, setting.warmup)):
            once = _seconds(call, index, 1, setting.device)
        repeats[name] = max(1, round(min_seconds / max(once, 1e-9)))
        step()
    seconds: dict[Name, list[float]] = {name: [] for name in contestants}
    order = list(contestants.items())
    for index in range(rounds):
        for name, call in order:
            seconds[name].append(_seconds(call, index, repeats[name], setting.device))
            step()
        order.reverse()
    timings = {
        name: Timing(tuple(seconds[name]), peak_memory(call, setting.device))
        for name, call in contestants.items()
    }
    for (head, other_of), name in product((against or {}).items(), timings):
        other = timings.get(other_of(name))
        if other is not None:
            timings[name].faster[head] = speedup(other, timings[name])
    return timings


def speedup(baseline: Timing, variant: Timing) -> Ratio:
    """How many times faster ``variant`` is than ``baseline``, both from one :func:`measure`."""
    pairs = [np.reshape(timing.seconds, (-1, 2)).sum(1) for timing in (baseline, variant)]
    low, median, high = np.percentile(pairs[0] / pairs[1], [25, 50, 75]).tolist()
    return Ratio(median, low, high)


def _seconds(call: Call, index: int, repeats: int, device: str) -> float:
    """Wall-clock time of one call, until a GPU has done its work."""
    wait = torch.cuda.synchronize if torch.device(device).type == 'cuda' else lambda: None
    wait()
    start = time.perf_counter()
    for repeat in range(repeats):
        call(index * repeats + repeat)
    wait()
    return (time.perf_counter() - start) / repeats


def peak_memory(call: Call, device: torch.device | str) -> int | None:
    """Bytes of a GPU that ``call(0)`` needs at its peak beyond what was in use; None on a CPU."""
    if torch.device(device).type != 'cuda':
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def describe_machine(device: torch.device | str = 'cpu') -> dict[str, str]:
    """What the numbers were taken on, for the head of a report."""
    cpuinfo = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    cpu = found[1] if found else platform.processor() or platform.machine()
    gpu = torch.device(device).type == 'cuda'
    return {
        'CPU': f'{cpu}, {os.cpu_count()} cores visible',
        'threads': str(torch.get_num_threads()),
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'PyTorch': torch.__version__,
        'Python': platform.python_version(),
        **({'GPU': torch.cuda.get_device_name(device)} if gpu else {}),
    }
