"""Means over seeds, and differences taken seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """Figures of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; not a number for a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of Student's t for the mean; infinite for a single seed."""
        if len(self.values) < 2:
            return -math.inf, math.inf
        factor = stats.t.ppf(0.5 + CONFIDENCE / 2, len(self.values) - 1)
        half = float(factor) * self.spread / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half

    def with_spread(self, digits: int = 1) -> str:
        """``46.2 ± 0.3``; without a spread for a single seed, a dash for none."""
        if not self.values:
            return '-'
        if len(self.values) < 2:
            return f'{self.mean:.{digits}f}'
        return f'{self.mean:.{digits}f} ± {self.spread:.{digits}f}'

    def with_interval(self, digits: int = 1, sign: str = '+') -> str:
        """``-0.4 [-1.1, +0.3]``; without an interval for a single seed."""
        if not self.values:
            return '-'
        text = f'{self.mean:{sign}.{digits}f}'
        if len(self.values) < 2:
            return text
        low, high = self.interval
        return f'{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]'


def sample(values: Mapping[int, float | None]) -> Sample:
    """The seeds that have a figure."""
    return Sample(tuple(value for value in values.values() if value is not None))


def paired(
    values: Mapping[int, float | None], baseline: Mapping[int, float | None], ratio: bool = False
) -> Sample:
    """Differences from the baseline's run of the same seed, or its share in percent."""
    pairs = [
        (value, baseline[seed])
        for seed, value in values.items()
        if value is not None and baseline.get(seed) is not None
    ]
    if ratio:
        return Sample(tuple(100 * value / base for value, base in pairs if base))
    return Sample(tuple(value - base for value, base in pairs))


def by_metric(results: Mapping[int, dict], metrics: Sequence[str]) -> dict[str, dict[int, float]]:
    """Seed -> figure, of each metric."""
    return {
        name: {seed: result['metrics'][name] for seed, result in results.items()}
        for name in metrics
    }
