from __future__ import annotations

import math

import pytest
from scipy import stats

from benchmarks.study.statistics import Sample, paired


def test_interval_is_that_of_scipy():
    stock, lite = {0: 40.0, 1: 42.0, 2: 41.5}, {2: 41.0, 0: 39.0, 1: 42.5}
    found = paired(lite, stock)
    expected = stats.ttest_rel([39.0, 42.5, 41.0], [40.0, 42.0, 41.5]).confidence_interval(0.95)
    assert found.mean == pytest.approx(-1 / 3)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert paired(lite, stock, ratio=True).values[0] == pytest.approx(100 * 41.0 / 41.5)


def test_only_seeds_that_both_have():
    assert paired({0: 1.0, 1: 5.0, 2: None}, {1: 3.0, 2: 2.0}).values == (2.0,)


def test_few_seeds_claim_nothing():
    assert Sample(()).with_spread() == Sample(()).with_interval() == '-'
    one = Sample((3.0,))
    assert one.with_spread() == '3.0'
    assert one.with_interval() == '+3.0'
    assert one.interval == (-math.inf, math.inf)
    assert Sample((1.0, 3.0)).with_spread() == '2.0 ± 1.4'
