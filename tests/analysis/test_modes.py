from __future__ import annotations

import pytest
import torch
from torch import nn

from mmlite.analysis.compare import Contestant, _in_modes, in_mode
from mmlite.analysis.encoders import STOCK, STOCK_FUSED, build_encoders, report
from mmlite.analysis.timing import Setting
from mmlite.nn import LiteEncoder


@pytest.fixture(autouse=True)
def compile_nothing(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda module: nn.Sequential(module))


def lite() -> LiteEncoder:
    return LiteEncoder('H3L1-(2+1)x1', embed_dims=32, num_heads=4, feedforward_channels=64)


def test_a_mode_says_why_not():
    stock = build_encoders([], 64)[STOCK]
    for encoder in (stock, lite()):
        assert in_mode(encoder, 'eager', 'cpu') is encoder
        assert in_mode(encoder, 'compiled', 'cuda:0')[0] is encoder
        with pytest.raises(ValueError, match='graphs are for CUDA devices, and this is cpu'):
            in_mode(encoder, 'graph', 'cpu')
    with pytest.raises(ValueError, match='reads values back'):
        in_mode(stock, 'graph', 'cuda')
    assert in_mode(lite(), 'graph', 'cuda')._replay is not None


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
    def detector(name: str, encoder: nn.Module) -> Contestant:
        return Contestant(name, nn.ModuleDict({'encoder': encoder}), 'encoder')

    contestants = [
        detector('stock', build_encoders([], 64)[STOCK]),
        detector('lite', lite()),
        Contestant('fcn', nn.Linear(1, 1), None),
    ]
    notes = []
    found = _in_modes(contestants, ('compiled', 'graph'), Setting(device='cuda'), notes)
    names = ['stock', 'stock, compiled', 'lite, compiled', 'lite, graph']
    assert [contestant.title for contestant in found] == names
    assert [note.partition(':')[2] for note in notes] == [
        ' stock, graph: it reads values back from the device, which a graph cannot hold.',
        ' fcn, compiled: it has no multi-scale encoder.',
        ' fcn, graph: it has no multi-scale encoder.',
    ]
    assert found[0].model is contestants[0].model
    assert contestants[1].model.encoder._replay is None  # a mode changes a copy
    assert found[3].model.encoder._replay is not None
