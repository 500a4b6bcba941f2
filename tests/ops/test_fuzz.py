"""Thousands of random calls of the registered operators: each is refused, or right."""

from __future__ import annotations

import os

import pytest
from operator_fuzz import fuzz

from mmlite.ops import cpu

# Another number and another seed: MMLITE_FUZZ_CALLS=100000 MMLITE_FUZZ_SEED=7
CALLS = int(os.environ.get('MMLITE_FUZZ_CALLS', 3000))
SEED = int(os.environ.get('MMLITE_FUZZ_SEED', 0))


@pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
def test_random_calls_are_refused_or_right():
    outcomes = fuzz(CALLS, SEED)
    # The fuzzer itself must do both.
    assert outcomes['refused'] > CALLS / 5 and outcomes['computed'] > CALLS / 5, outcomes
