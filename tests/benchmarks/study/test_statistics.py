from __future__ import annotations

import math

import pandas as pd
import pytest
from scipy import stats

from benchmarks.study.statistics import difference, interval, share, with_interval, with_spread


def test_interval_is_that_of_scipy():
    stock, lite = pd.Series({0: 40.0, 1: 42.0, 2: 41.5}), pd.Series({2: 41.0, 0: 39.0, 1: 42.5})
    found = difference(lite, stock)
    expected = stats.ttest_rel([39.0, 42.5, 41.0], [40.0, 42.0, 41.5]).confidence_interval(0.95)
    assert found.mean() == pytest.approx(-1 / 3)
    assert interval(found) == pytest.approx((expected.low, expected.high))
    assert share(lite, stock)[2] == pytest.approx(100 * 41.0 / 41.5)


def test_only_seeds_that_both_have():
    found = difference(pd.Series({0: 1.0, 1: 5.0, 2: math.nan}), pd.Series({1: 3.0, 2: 2.0}))
    assert found.to_dict() == {1: 2.0}


def test_few_seeds_claim_nothing():
    none, one = pd.Series([], dtype=float), pd.Series([3.0])
    assert with_spread(none) == with_interval(none) == '-'
    assert with_spread(one) == '3.0'
    assert with_interval(one) == '+3.0'
    assert interval(one) == (-math.inf, math.inf)
    assert with_spread(pd.Series([1.0, 3.0])) == '2.0 ± 1.4'
