"""A study from its plan to its report: tiny drawn images, a tiny detector, two epochs."""

import csv
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from scipy import stats
from small_detectors import batch, losses, small_model

import benchmarks.study.narrow_dino  # noqa: F401  (registers it)
from benchmarks.study.__main__ import study
from benchmarks.study.execute import Study
from benchmarks.study.plan import SHIPPED, fingerprint, read_plan
from benchmarks.study.statistics import (
    difference,
    equivalence,
    interval,
    share,
    with_interval,
    with_spread,
)

register_all_modules()
THIN = {'embed_dims': 32}
LAYER = {'self_attn_cfg': THIN, 'ffn_cfg': {**THIN, 'feedforward_channels': 32}}
MODEL = {
    'num_queries': 20,
    'backbone': {'base_channels': 8},
    'neck': {'in_channels': [16, 32, 64], 'out_channels': 32},
    'positional_encoding': {'num_feats': 16},
    'encoder': {'num_layers': 2, 'layer_cfg': LAYER},
    'decoder': {'num_layers': 1, 'layer_cfg': {**LAYER, 'cross_attn_cfg': THIN}},
    'bbox_head': THIN,
    'dn_cfg': {'group_cfg': {'num_dn_queries': 4}},
    'test_cfg': {'max_per_img': 20},
}
LITE = {'set': {'model': {'type': 'LiteNarrowDINO', 'encoder': {'schedule': 'H3L1-(2+1)x1'}}}}
DRAWN = {'style': 'details', 'train': 8, 'val': 2, 'image_size': 96, 'seed': 0}
PLAN = {
    'baseline': 'stock',
    'seeds': [0],
    'data': {
        'drawn': {'draw': DRAWN, 'config': str(SHIPPED / 'dino-4scale_r18_1xb8-8e_details.py')}
    },
    'set': {
        'model': MODEL,
        'train_dataloader': {'batch_size': 4},
        'train_cfg': {'max_epochs': 2, 'val_interval': 1},
    },
    'rows': {'stock': None, 'lite': LITE, 'warm': {**LITE, 'warm_start': 'stock'}},
}


def write(folder: Path, **changes) -> str:
    path = folder / 'tiny.yaml'
    path.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(study, [*map(str, arguments)])


def test_trains_reports_and_does_nothing_twice(tmp_path):
    rows = {'stock': None, 'warm': PLAN['rows']['warm']}
    plan = write(tmp_path, rows=rows, margin=1)
    result = run(plan, '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    assert 'drawn, stock, seed 0: AP ' in result.output
    folder = tmp_path / 'out/tiny'
    found = json.loads((folder / 'drawn/warm/seed0/result.json').read_text())
    assert found['finite'] and found['encoder_gflops'] > 0 and found['train_ms'] > 0
    assert [point['epoch'] for point in found['curve']] == [1, 2]
    page = (folder / 'report.html').read_text()
    for text in ('2 of 2 runs finished', '<svg', 'learning curves', 'warm', 'within 1 %'):
        assert text in page
    shown = re.findall(r'!\[.*\]\((.*)\)', (folder / 'report.md').read_text())
    assert len(shown) == page.count('<svg')
    assert all((folder / path).read_text().startswith('<svg') for path in shown)
    with (folder / 'runs.csv').open() as file:
        assert [line['row'] for line in csv.DictReader(file)] == ['stock', 'warm']

    # Planted, a run whose loss was not finite: it is named, not averaged, and not trained again.
    path = folder / 'drawn/warm/seed0/result.json'
    path.write_text(json.dumps({**found, 'finite': False, 'problem': 'the loss is nan'}))
    again = run(plan, '--out', tmp_path / 'out')
    assert again.exit_code == 0, again.output
    assert 'Not averaged' in again.output
    assert '| warm |' not in (folder / 'report.md').read_text()
    assert json.loads(path.read_text())['problem'] == 'the loss is nan'


def test_converts_without_labels_and_evaluates_what_came_out(tmp_path):
    schedules = ['H3L1-(2+1)x1', 'H3L1-(1+1)x2']

    def elastic(schedule: str) -> dict:
        encoder = {'schedule': schedule, 'elastic': schedules}
        return {'set': {'model': {'type': 'LiteNarrowDINO', 'encoder': encoder}}}

    how = {'teacher': 'stock', 'iterations': 5, 'batch_size': 4}
    rows = {
        'stock': None,
        'lite': {'convert': how, **elastic(schedules[0])},
        'same': {'evaluate': 'lite', **elastic(schedules[0])},
        'other': {'evaluate': 'lite', **elastic(schedules[1])},
    }
    result = run(write(tmp_path, rows=rows), '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    folder = tmp_path / 'out/tiny/drawn'
    found = {row: json.loads((folder / row / 'seed0/result.json').read_text()) for row in rows}
    assert [point['iteration'] for point in found['lite']['curve']] == [2, 4, 5]
    assert found['lite']['metrics'] == found['same']['metrics']
    assert found['lite']['encoder_gflops'] == found['same']['encoder_gflops']
    assert found['other']['encoder_gflops'] > found['same']['encoder_gflops']
    stock, lite, same = (
        torch.load(folder / row / 'seed0/weights.pth')['state_dict'] for row in list(rows)[:3]
    )
    assert all(torch.equal(lite[name], value) for name, value in same.items())
    for name in set(stock) & set(lite):  # nothing but the encoder was trained
        assert name.startswith('encoder.') or torch.equal(stock[name], lite[name]), name


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['nothing'], 'these ship: aquarium, coco, conversion, equivalence, small, small-objects'),
        (['small', '--data', 'details=x'], 'those that take one are: bccd'),
        (['small', '--report'], 'run the study first'),
        (['coco'], 'instances_train2017.json does not exist'),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code != 0 and 'Traceback' not in result.output
    assert sentence in ' '.join(result.output.split())
    assert not (tmp_path / 'work_dirs').exists()


def test_runs_go_seed_by_seed_and_the_first_come_first(tmp_path):
    plan = read_plan(write(tmp_path, seeds=[3, 4], first=[{'rows': ['stock', 'lite']}]))
    assert [run.name for run in plan.runs] == [
        *('drawn/stock/seed3', 'drawn/lite/seed3', 'drawn/stock/seed4', 'drawn/lite/seed4'),
        *('drawn/warm/seed3', 'drawn/warm/seed4'),
    ]
    stock, lite, _, _, warm, _ = (fingerprint(plan.config(run)) for run in plan.runs)
    assert stock != lite == warm
    data = {name: PLAN['data']['drawn'] for name in ('drawn', 'again')}
    rows = {'stock': None, 'lite': {**LITE, 'data': ['again']}}
    plan = read_plan(write(tmp_path, data=data, rows=rows))
    assert [run.name for run in plan.runs] == [
        *('drawn/stock/seed0', 'again/stock/seed0', 'again/lite/seed0'),
    ]


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'baseline': 'stok'}, "no row called 'stok'; did you mean stock"),
        ({'metric': 'mAP'}, "no metric called 'mAP'"),
        ({'seeds': 3}, 'seeds are a list'),
        ({'margin': 0}, 'margin is a percentage above 0, not 0'),
        ({'rows': {'stock': {'overrides': {}}}}, "no entry of row stock called 'overrides'"),
        ({'rows': {'stock': {'warm_start': 'teacher'}}}, "no row called 'teacher'"),
        (
            {'rows': {'stock': {'convert': {'teacher': 'stock'}}}},
            'convert of stock needs iterations',
        ),
        ({'rows': {'stock': {'data': ['drwn']}}}, "no data set called 'drwn'; did you mean drawn"),
        (
            {'rows': {**PLAN['rows'], 'twice': {'warm_start': 'warm'}}},
            'twice starts from warm, which needs the weights of another row itself',
        ),
        ({'data': {'drawn': {'config': 'a.py'}}}, 'either root, its folder, or draw'),
        ({'data': {'a': {'root': 'a', 'config': 'missing.py'}}}, r'missing\.py does not exist'),
        ({'rows': {'stock': {'set': {'max_epochs': {'a': 1}}}}}, 'seed 0 do not fit'),
    ],
)
def test_says_what_is_wrong_with_a_plan(tmp_path, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        Study(read_plan(write(tmp_path, **changes)), tmp_path / 'out').check()
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', sorted(path.stem for path in SHIPPED.glob('*.yaml')))
def test_shipped_plans_build(name):
    """And what a row is called is what it builds."""
    shipped = read_plan(name)
    for run in shipped.runs:
        if run.seed or run.data is not next(iter(shipped.data.values())):
            continue
        model = shipped.config(run).model
        model.backbone = {'type': 'ResNet', 'depth': 18}  # timm's would need its weights
        encoder = MODELS.build(model).encoder
        assert len(encoder.layers) == 6 + 3 * ('sequential' in run.row.name)
        schedule = next((w for w in run.row.name.split() if w.startswith('H')), None)
        if schedule is None:
            assert not hasattr(encoder, 'schedule')
        else:
            assert str(encoder.schedule) == schedule
            assert encoder.key_aware == ('without KDA' not in run.row.name)
            assert encoder.small_ffn == ('without small FFN' not in run.row.name)


def test_narrow_dino_of_256_channels_is_dino():
    stock, narrow = small_model('DINO', std=0.05), small_model('DINO', type='NarrowDINO')
    narrow.load_state_dict(stock.state_dict())
    expected, actual = (dict(losses(model, batch(model))) for model in (stock, narrow))
    torch.testing.assert_close(actual, expected)


def test_interval_is_that_of_scipy():
    stock, lite = pd.Series({0: 40.0, 1: 42.0, 2: 41.5}), pd.Series({2: 41.0, 0: 39.0, 1: 42.5})
    found = difference(lite, stock)
    expected = stats.ttest_rel([39.0, 42.5, 41.0], [40.0, 42.0, 41.5]).confidence_interval(0.95)
    assert found.mean() == pytest.approx(-1 / 3)
    assert interval(found) == pytest.approx((expected.low, expected.high))
    assert share(lite, stock)[2] == pytest.approx(100 * 41.0 / 41.5)
    # Only seeds that both have; few claim nothing.
    found = difference(pd.Series({0: 1.0, 1: 5.0, 2: math.nan}), pd.Series({1: 3.0, 2: 2.0}))
    assert found.to_dict() == {1: 2.0}
    none, one = pd.Series([], dtype=float), pd.Series([3.0])
    assert with_spread(none) == with_interval(none) == '-'
    assert (with_spread(one), with_interval(one)) == ('3.0', '+3.0')
    assert interval(one) == (-math.inf, math.inf)
    assert with_spread(pd.Series([1.0, 3.0])) == '2.0 ± 1.4'


def test_equivalence_holds_within_the_margin_alone():
    """p is the 5 % of a test where the 90 % interval just touches the margin."""
    shares = pd.Series([99.0, 101.0, 100.5, 99.5, 100.2])
    low, high = stats.ttest_1samp(shares, 100).confidence_interval(0.9)
    assert low < 100 < high
    assert equivalence(shares, max(100 - low, high - 100)) == pytest.approx(0.05)
    assert equivalence(shares - shares.mean() + 99, 1) == pytest.approx(0.5)
    assert equivalence(shares + 3, 1) > 0.99
    assert math.isnan(equivalence(pd.Series([100.0]), 1))
