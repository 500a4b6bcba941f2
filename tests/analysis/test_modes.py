from __future__ import annotations

import pytest
import torch
from torch import nn

from mmlite.analysis.compare import Contestant, _in_modes
from mmlite.analysis.comparison import compare_encoders
from mmlite.analysis.contestants import STOCK, STOCK_FUSED, Encoder, build_encoders
from mmlite.analysis.timing import Setting
from mmlite.nn import LiteEncoder


@pytest.fixture(autouse=True)
def compile_nothing(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda module: nn.Sequential(module))


def lite() -> LiteEncoder:
    return LiteEncoder('H3L1-(2+1)x1', embed_dims=32, num_heads=4, feedforward_channels=64)


def test_an_encoder_in_modes():
    stock, own = build_encoders([], 64)[0], Encoder('lite', lite(), '')
    for encoder in (stock, own):
        assert encoder.in_form('eager', 'cpu') is encoder
        compiled = encoder.in_form('compiled', 'cpu')
        assert type(compiled.model[0]) is type(encoder.model)
        assert compiled.title == f'{encoder.name}, compiled'
        with pytest.raises(ValueError, match='graphs are for CUDA devices, and this is cpu'):
            encoder.in_form('graph', 'cpu')
    with pytest.raises(ValueError, match='reads values back'):
        stock.in_form('graph', 'cuda')
    assert own.in_form('graph', 'cuda').model._replay is not None
    assert own.model._replay is None  # a mode changes a copy


def test_encoders_in_modes(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda module: module)
    setting = Setting((32, 48), rounds=2, warmup=1, training=True)
    found = compare_encoders(setting, ['H3L1-(2+1)x3'], 64, ('compiled', 'graph'))
    names = [STOCK_FUSED, 'Lite H3L1-(2+1)x3', 'Lite H3L1-(2+1)x3, no KDA']
    expected = [STOCK, *(f'{name}, compiled' for name in [STOCK, *names])]
    assert [result.name for result in found.results] == expected
    assert all(result.training and result.latency for result in found.results)
    assert sum('graph: graphs are for CUDA devices' in note for note in found.notes) == 4


def test_detectors_in_modes():
    def detector(name: str, encoder: nn.Module) -> Contestant:
        return Contestant(name, nn.ModuleDict({'encoder': encoder}), 'encoder')

    contestants = [
        detector('stock', build_encoders([], 64)[0].model),
        detector('lite', lite()),
        Contestant('fcn', nn.Linear(1, 1), None),
    ]
    found, notes = _in_modes(contestants, ('compiled', 'graph'), 'cuda')
    names = ['stock', 'stock, compiled', 'lite, compiled', 'lite, graph']
    assert [contestant.title for contestant in found] == names
    assert [note.partition(':')[2] for note in notes] == [
        ' stock, graph: it reads values back from the device, which a graph cannot hold.',
        ' fcn, compiled: it has no multi-scale encoder.',
        ' fcn, graph: it has no multi-scale encoder.',
    ]
    assert found[0].model is contestants[0].model
    assert found[3].model.encoder._replay is not None
