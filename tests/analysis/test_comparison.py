import pytest
import torch
from torch import nn

from mmlite.analysis.comparison import compare
from mmlite.analysis.contestants import STOCK, STOCK_FUSED, Model, encoders
from mmlite.analysis.report import time_tables
from mmlite.analysis.timing import Ratio, Setting, Timing
from mmlite.nn import LiteEncoder

SETTING = Setting((32, 48), rounds=2, warmup=1, parts=('inference', 'training'))


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """What was compiled, in place of compiling it."""
    found = []
    monkeypatch.setattr(torch, 'compile', lambda function: found.append(function) or function)
    return found


def test_encoders_in_modes(compiled):
    report = compare([encoders(['H3L1-(2+1)x3'], 64)], SETTING, ('compiled',))
    names = [STOCK, STOCK_FUSED, 'Lite H3L1-(2+1)x3', 'Lite H3L1-(2+1)x3, no KDA']
    assert [e.name for e in report.results] == [STOCK, *(f'{name}, compiled' for name in names)]
    assert len(compiled) == len(names)
    for each in report.results:
        for part in SETTING.parts:
            assert (each.timings[part][1].faster['faster'].median == 1) == (each.name == STOCK)


def test_table_of_times():
    model = Model('lite')
    model.timings = {'inference': {2: Timing((0.5, 0.25), 3 * 2**20, {'faster': Ratio(2, 1, 3)})}}
    (table,) = time_tables([model], Setting((32, 48), (1, 2)), 'cpu')
    assert table.title == 'Inference, 32x48, batch 2, float32, cpu'
    heads = ['model', 'median ms', 'mean ms', 'p95 ms', 'faster', 'peak MiB']
    cells = ['lite', '375', '375', '488', '2.00x (1.00 to 3.00)', '3.0']
    assert (table.columns, table.rows) == (heads, [cells])


def test_detectors_in_modes(compiled):
    lite = LiteEncoder('H3L1-(2+1)x1', embed_dims=32, num_heads=4, feedforward_channels=64)
    models = [
        Model('detector', nn.ModuleDict({'encoder': lite}), 'encoder'),
        Model('fcn', nn.Linear(1, 1), None),
    ]
    one = models[0].in_mode('compiled')
    assert one.model is not models[0].model  # a mode changes a copy
    assert compiled == [one.model['encoder'].forward]
    assert (one.name, one.mode, models[0].name) == ('detector, compiled', 'compiled', 'detector')
    with pytest.raises(ValueError, match='no multi-scale encoder'):
        models[1].in_mode('compiled')
    assert models[1].in_mode('eager') is models[1]


def test_what_a_mode_cannot_run_is_named():
    class Alone(Model):
        def in_mode(self, mode):
            if mode != 'eager':
                raise ValueError('it does not')
            return self

    one = encoders(['H3L1-(2+1)x3'], 64)[2]
    lite = one.model
    alone = Alone('lite', lite, '', one.inputs, one.loss)
    report = compare([[alone]], SETTING, ('eager', 'fused'))
    assert [each.name for each in report.results] == ['lite']
    assert report.notes[0] == 'Not measured: lite, fused: it does not.'
    gradients = [parameter.grad for parameter in lite.parameters()]
    assert gradients == [None] * len(gradients)  # a training step leaves none
