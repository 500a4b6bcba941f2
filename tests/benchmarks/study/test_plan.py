from __future__ import annotations

from pathlib import Path

import pytest
import small_study
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

from benchmarks.study.execute import Study
from benchmarks.study.plan import SHIPPED, fingerprint, read_plan
from mmlite.analysis.published import preset

register_all_modules()
PLANS = sorted(path.stem for path in SHIPPED.glob('*.yaml'))


def plan(folder, **changes):
    return read_plan(str(small_study.write(folder, **changes)))


def test_runs_go_seed_by_seed_and_the_first_come_first(tmp_path):
    first = [{'rows': ['stock', 'lite']}]
    names = [run.name for run in plan(tmp_path, seeds=[3, 4], first=first).runs]
    assert names == [
        *('drawn/stock/seed3', 'drawn/lite/seed3', 'drawn/stock/seed4', 'drawn/lite/seed4'),
        *('drawn/warm/seed3', 'drawn/warm/seed4'),
    ]


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'baseline': 'stok'}, "no row called 'stok'; did you mean stock"),
        ({'metric': 'mAP'}, "no metric called 'mAP'"),
        ({'seeds': 3}, 'seeds are a list'),
        ({'rows': {}}, 'rows must have entries'),
        ({'rows': {'stock': {'overrides': {}}}}, "no entry of row stock called 'overrides'"),
        ({'rows': {'stock': None, 'Stock!': None}}, 'differ in punctuation alone'),
        ({'rows': {'stock': {'warm_start': 'teacher'}}}, "no row called 'teacher'"),
        ({'data': {'drawn': {'config': 'a.py'}}}, 'either root, its folder, or draw'),
        ({'data': {'real': {'root': 'data/real'}}}, 'neither row stock nor data set real'),
        ({'first': [{'rows': ['light']}]}, "no row called 'light'"),
    ],
)
def test_says_what_is_wrong(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        plan(tmp_path, **changes)
    assert 'tiny.yaml' in str(error.value)


def test_missing_config_and_data_stop_it(tmp_path):
    data = {'real': {'root': str(tmp_path / 'real'), 'config': 'missing.py'}}
    study = Study(plan(tmp_path, data=data), tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match=r'missing\.py does not exist'):
        study.check()
    data['real']['config'] = str(SHIPPED / 'dino-4scale_r18_1xb8-40e_bccd.py')
    study = Study(plan(tmp_path, data=data), tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match=r'train\.json does not exist.*--data real='):
        study.check()
    assert not (tmp_path / 'out').exists()


def test_override_that_does_not_fit(tmp_path):
    study = Study(plan(tmp_path, rows={'stock': {'set': {'max_epochs': {'a': 1}}}}), tmp_path)
    with pytest.raises(ValueError, match='overrides of drawn, stock, seed 0 do not fit'):
        study.check()


def test_fingerprint_sees_an_override(tmp_path):
    found = plan(tmp_path)
    stock, lite, warm = (fingerprint(found.config(run)) for run in found.runs)
    assert stock != lite == warm


@pytest.mark.parametrize('name', PLANS)
def test_shipped_plans_build(name):
    """And what a row is called is what it builds."""
    shipped = read_plan(name)
    for run in shipped.runs:
        if run.seed or run.data is not next(iter(shipped.data.values())):
            continue
        config = shipped.config(run)
        encoder = MODELS.build(config.model).encoder
        assert len(encoder.layers) == 6 + 3 * ('sequential' in run.row.name)
        schedule = next((w for w in run.row.name.split() if w.startswith('H')), None)
        if schedule is None:
            assert not hasattr(encoder, 'schedule')
        else:
            assert str(encoder.schedule) == schedule
            assert encoder.key_aware == ('without KDA' not in run.row.name)
            assert encoder.small_ffn == ('without small FFN' not in run.row.name)
        levels = config.model.get('num_feature_levels', 4)
        assert (levels == 3) == ('three maps' in run.row.name)


def test_coco_has_published_rows():
    shipped = read_plan('coco', {'coco': Path('elsewhere')})
    assert shipped.data['coco'].root == Path('elsewhere')
    published = {row.config for group in preset('paper-table4') for row in group}
    assert len(published & {row.config for row in shipped.rows.values()}) == 4
