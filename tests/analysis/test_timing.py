"""The pairing must cancel drift; nothing here asserts how long anything takes."""

import pytest

from mmlite.analysis import timing
from mmlite.analysis.timing import Setting, Timing, measure, speedup


def test_order_alternates():
    order, steps = [], []
    calls = {name: lambda index, name=name: order.append(name) for name in 'abc'}
    measure(calls, Setting(rounds=3, warmup=1), lambda text, total: lambda: steps.append(total))
    assert order[:15] == list('abc' + 'abc' + 'cba' + 'abc' + 'cba')
    assert len(steps) == steps[0] == 15  # the bar runs to its end


def test_drift_cancels(monkeypatch):
    taken = []

    def fake(call, index, repeats, device):
        """What the calls say they took, on a machine that slows down steadily."""
        taken.append(call(index))
        return taken[-1] * (1 + 0.1 * len(taken))

    monkeypatch.setattr(timing, '_seconds', fake)
    calls = {'slow': lambda index: 3.0, 'fast': lambda index: 1.0}
    against = {'faster': lambda name: 'slow', 'than nobody': lambda name: None}
    timings = measure(calls, Setting(rounds=8), against=against)
    assert timings['slow'].faster['faster'].median == 1
    assert list(timings['fast'].faster) == ['faster']
    assert timings['fast'].faster['faster'].median == pytest.approx(3.0, rel=1e-9)
    # The plain means differ: the two are not measured at the same moments, round by round.
    assert timings['slow'].seconds[0] / timings['fast'].seconds[0] != pytest.approx(3.0, rel=1e-3)


def test_quick_calls_are_repeated():
    seen = []
    measure({'quick': seen.append}, Setting(rounds=2, warmup=1), min_seconds=0.001)
    assert len(seen) > 20
    assert len(set(seen)) > 10  # the running number lets a call choose among inputs


def test_statistics():
    taken = Timing((4.0, 1.0, 2.0, 3.0))
    assert (taken.median, taken.mean) == (2.5, 2.5)
    assert taken.p95 == pytest.approx(3.85)
    ratio = speedup(Timing((4.0, 4.0, 8.0, 8.0)), Timing((1.0, 1.0, 1.0, 1.0)))
    assert (ratio.low, ratio.median, ratio.high) == (5.0, 6.0, 7.0)
    assert str(ratio) == '6.00x (5.00 to 7.00)'


@pytest.mark.parametrize(('calls', 'rounds'), [({}, 2), ({'a': lambda index: None}, 0)])
def test_nothing_to_measure(calls, rounds):
    with pytest.raises(ValueError, match='at least one contestant and one round'):
        measure(calls, Setting(rounds=rounds))
