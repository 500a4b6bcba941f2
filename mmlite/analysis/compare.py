"""The harness of every benchmark: contestants are measured in turns and become rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .report import Table, cells, size
from .timing import Call, Setting, Start, Timing, measure, silent


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

    def work(self, part: str, batch_size: int) -> dict[str, float]:
        """What a call gets done, by the unit of its rate."""
        return {'images/s': batch_size}

    def as_json(self) -> dict:
        return {**self.label(), 'timings': self.timings}


def take_turns(
    contestants: Sequence[Contestant],
    setting: Setting,
    against: Mapping[str, Callable[[Contestant], Contestant | None]],
    start: Start = silent,
    min_seconds: float = 0.0,
) -> None:
    """Measure every part at every batch size; fills :attr:`Contestant.timings`.

    ``against`` and ``min_seconds`` are as for :func:`~mmlite.analysis.timing.measure`.
    """
    for part in setting.parts if setting.rounds else ():
        for batch_size in setting.batch_sizes:
            calls = {each: each.call(part, setting, batch_size) for each in contestants}
            calls = {each: call for each, call in calls.items() if call is not None}
            text = f'{part}, batch {batch_size}'
            timings = measure(calls, setting, start, text, against=against, min_seconds=min_seconds)
            for each, timing in timings.items():
                each.timings.setdefault(part, {})[batch_size] = timing


def time_tables(contestants: Sequence[Contestant], setting: Setting, where: str) -> list[Table]:
    """A table for each part and batch size: time, how many times faster, memory, rate."""
    found = []
    for part in setting.parts:
        for batch_size in setting.batch_sizes:
            rows = []
            for each in contestants:
                timing = each.timings.get(part, {}).get(batch_size)
                if timing is not None:
                    work = each.work(part, batch_size).items()
                    rates = {unit: f'{amount / timing.median:.2f}' for unit, amount in work}
                    rows.append({**each.label(), **cells(timing), **rates})
            shape = f'{size(setting.image_size)}, batch {batch_size}, {setting.dtype}'
            title = f'{part.capitalize()}, {shape}, {where}'
            found += [Table(title, rows)] if rows else []
    return found
