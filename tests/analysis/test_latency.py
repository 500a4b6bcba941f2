"""The pairing must cancel drift; nothing here asserts how long anything takes."""

from __future__ import annotations

import pytest
import torch

from mmlite.analysis import latency
from mmlite.analysis.latency import Timing, measure, measurements, num_threads, speedup


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows what the calls say they took, on a machine that slows down steadily."""
    taken = []

    def fake(call, index, repeats):
        taken.append(call(index))
        return taken[-1] * (1 + 0.1 * len(taken))

    monkeypatch.setattr(latency, '_wall_clock', fake)
    return taken


def test_order_alternates():
    order = []
    calls = {name: lambda index, name=name: order.append(name) for name in 'abc'}
    steps = []
    measure(calls, rounds=3, warmup=1, on_step=lambda: steps.append(1))
    assert order == list('abc' + 'abc' + 'cba' + 'abc' + 'cba')
    assert len(steps) == measurements(3, 3) == 15


def test_drift_cancels(clock):
    timings = measure({'slow': lambda index: 3.0, 'fast': lambda index: 1.0}, rounds=8)
    assert speedup(timings['slow'], timings['fast']).median == pytest.approx(3.0, rel=1e-9)
    # The plain means differ: the two are not measured at the same moments, round by round.
    assert timings['slow'].seconds[0] / timings['fast'].seconds[0] != pytest.approx(3.0, rel=1e-3)


def test_quick_calls_are_repeated():
    seen = []
    measure({'quick': seen.append}, rounds=2, warmup=1, min_seconds=0.001)
    assert len(seen) > 20
    assert len(set(seen)) > 10  # the running number lets a call choose among inputs


def test_statistics():
    timing = Timing((4.0, 1.0, 2.0, 3.0))
    assert (timing.median, timing.mean) == (2.5, 2.5)
    assert timing.p95 == pytest.approx(3.85)
    ratio = speedup(Timing((4.0, 4.0, 8.0, 8.0)), Timing((1.0, 1.0, 1.0, 1.0)))
    assert (ratio.low, ratio.median, ratio.high) == (5.0, 6.0, 7.0)
    assert str(ratio) == '6.00x (5.00 to 7.00)'


def test_nothing_to_measure():
    with pytest.raises(ValueError, match='at least one contestant'):
        measure({})


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), num_threads(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
