"""Figures of several seeds as texts, and the interval of their mean."""

from __future__ import annotations

import math

import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


def interval(values: pd.Series) -> tuple[float, float]:
    """Student's interval for the mean; infinite for a single seed."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * values.sem()
    return values.mean() - half, values.mean() + half


def with_spread(values: pd.Series) -> str:
    """``46.2 ± 0.3``; without a spread for a single seed, a dash for none."""
    if values.empty:
        return '-'
    return f'{values.mean():.1f}' + (f' ± {values.std():.1f}' if len(values) > 1 else '')


def with_interval(values: pd.Series, sign: str = '+') -> str:
    """``-0.4 [-1.1, +0.3]``; without an interval for a single seed, a dash for none."""
    if values.empty:
        return '-'
    low, high = interval(values)
    bounds = f' [{low:{sign}.1f}, {high:{sign}.1f}]' if len(values) > 1 else ''
    return f'{values.mean():{sign}.1f}{bounds}'


def difference(values: pd.Series, baseline: pd.Series) -> pd.Series:
    """What each seed has more than the baseline's run with the same seed."""
    return (values - baseline).dropna()


def equivalence(shares: pd.Series, margin: float) -> float:
    """p of the test that the mean share, in percent, is 100 within the margin.

    It is the larger p of two one-sided t-tests. Below 0.05 the row is equivalent to the baseline.
    nan for a single seed.
    """
    if len(shares) < 2:
        return math.nan
    above = stats.ttest_1samp(shares, 100 - margin, alternative='greater')
    below = stats.ttest_1samp(shares, 100 + margin, alternative='less')
    return max(above.pvalue, below.pvalue)


def share(values: pd.Series, baseline: pd.Series) -> pd.Series:
    """Each seed's share of the baseline's run with the same seed, in percent."""
    return (100 * values / baseline[baseline != 0]).dropna()
