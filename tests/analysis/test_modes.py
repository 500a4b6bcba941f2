from __future__ import annotations

import pytest
import torch
from torch import nn

from mmlite.analysis import modes
from mmlite.analysis.compare import Result, _in_modes
from mmlite.analysis.encoders import STOCK, STOCK_FUSED, build_encoders, report
from mmlite.analysis.published import DetectorSpec
from mmlite.analysis.setting import Setting
from mmlite.nn import LiteEncoder


@pytest.fixture(autouse=True)
def compile_nothing(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda module: nn.Sequential(module))


def lite() -> LiteEncoder:
    return LiteEncoder('H3L1-(2+1)x1', embed_dims=32, num_heads=4, feedforward_channels=64)


def test_a_mode_says_why_not():
    stock = build_encoders([], 64)[STOCK]
    for encoder in (stock, lite()):
        assert modes.why_not(encoder, 'eager', 'cpu') == ''
        assert modes.why_not(encoder, 'compiled', 'cuda:0') == ''
        assert 'graphs are for CUDA devices' in modes.why_not(encoder, 'graph', 'cpu')
    assert 'reads values back' in modes.why_not(stock, 'graph', 'cuda')
    assert modes.why_not(lite(), 'graph', 'cuda') == ''


def test_a_mode_changes_a_copy():
    encoder = lite()
    assert modes.in_mode(encoder, 'eager') is encoder
    graph = modes.in_mode(encoder, 'graph')
    assert graph._replay is not None and encoder._replay is None
    assert modes.in_mode(encoder, 'compiled')[0] is not encoder


def test_encoders_in_modes(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda module: module)
    setting = Setting((32, 48), rounds=2, warmup=1, training=True)
    found = report(
        setting, ['H3L1-(2+1)x3'], 64, False, lambda *_: lambda: None, ('compiled', 'graph')
    )
    lites = ['Lite H3L1-(2+1)x3', 'Lite H3L1-(2+1)x3, no KDA']
    expected = [STOCK, f'{STOCK}, compiled', STOCK_FUSED, f'{STOCK_FUSED}, compiled']
    expected += [f'{name}, compiled' for name in lites]
    for direction in ('inference', 'training step'):
        assert [r['name'] for r in found.results if r['direction'] == direction] == expected
    assert sum('graph: graphs are for CUDA devices' in note for note in found.notes) == 4


def test_detectors_in_modes():
    class Detector(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

    models = [Detector(build_encoders([], 64)[STOCK]), Detector(lite()), nn.Linear(1, 1)]
    results = [Result(DetectorSpec(name), None, {}) for name in ('stock.py', 'lite.py', 'fcn.py')]
    found, variants = _in_modes(results, models, ('compiled', 'graph'), 'cuda')
    names = ['stock', 'stock, compiled', 'lite, compiled', 'lite, graph']
    assert [result.name for result in found] == names
    assert found[0].latency is not found[1].latency
    assert variants[0] is models[0] and models[1].encoder._replay is None
    assert variants[3].encoder._replay is not None
