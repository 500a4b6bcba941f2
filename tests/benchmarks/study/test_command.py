from __future__ import annotations

import csv
import json
import re

import pytest
import small_study
from click.testing import CliRunner

from benchmarks.study.__main__ import study


def run(*arguments):
    return CliRunner().invoke(study, [*map(str, arguments)])


def test_trains_reports_and_does_nothing_twice(tmp_path):
    rows = {'stock': None, 'warm': {'set': small_study.LITE, 'warm_start': 'stock'}}
    plan = small_study.write(tmp_path, rows=rows)
    result = run(plan, '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    assert 'drawn, stock, seed 0: AP ' in result.output
    folder = tmp_path / 'out/tiny'
    found = json.loads((folder / 'drawn/warm/seed0/result.json').read_text())
    assert found['finite']
    assert found['encoder_gflops'] > 0
    assert found['train_ms'] > 0
    assert (folder / 'drawn/warm/seed0/config.py').is_file()
    page = (folder / 'report.html').read_text()
    for text in ('2 of 2 runs finished', '<svg', 'learning curves', 'warm'):
        assert text in page
    shown = re.findall(r'!\[.*\]\((.*)\)', (folder / 'report.md').read_text())
    assert len(shown) == page.count('<svg')
    assert all((folder / path).read_text().startswith('<svg') for path in shown)
    with (folder / 'runs.csv').open() as file:
        assert [line['row'] for line in csv.DictReader(file)] == ['stock', 'warm']

    # Planted, a run whose loss was not finite: it is named, and not averaged.
    path = folder / 'drawn/warm/seed0/result.json'
    path.write_text(json.dumps({**found, 'finite': False, 'problem': 'the loss is nan'}))
    again = run(plan, '--out', tmp_path / 'out', '--report')
    assert again.exit_code == 0, again.output
    assert 'Not averaged' in again.output
    assert '| warm |' not in (folder / 'report.md').read_text()
    assert json.loads(path.read_text())['problem'] == 'the loss is nan'


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        ([], "Missing argument 'PLAN'"),
        (['nothing'], 'these ship: coco, small'),
        (['small', '--data', 'details=x'], 'those that take one are: bccd'),
        (['small', '--data', 'bccd'], 'names no folder'),
        (['small', '--report'], 'run the study first'),
        (['coco'], 'instances_train2017.json does not exist'),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code != 0
    assert sentence in ' '.join(result.output.split())
    assert 'Traceback' not in result.output
    assert not (tmp_path / 'work_dirs').exists()
