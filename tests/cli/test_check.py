from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmlite.cli import main
from mmlite.datasets import generate_shapes

CONFIG = Path(__file__).parents[2] / (
    'configs/small/lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate_shapes(tmp_path / 'data/shapes', {'train': 3, 'val': 2})
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {str(CONFIG)!r}\n')
    return path


def run(*arguments):
    return CliRunner().invoke(main, ['check', *map(str, arguments)])


def test_all_is_well(config, tmp_path):
    result = run(config, '--workers', 1, '--json', tmp_path / 'report.json')
    assert result.exit_code == 0, result.output
    assert 'No problems found' in result.output
    assert 'triangle' in result.output
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['problems'] == 0
    assert [data['name'] for data in report['data']] == ['train', 'val, test']


def test_problems_in_the_data_and_the_model(config, tmp_path):
    image = Path('data/shapes/val/00001.png')
    image.write_bytes(image.read_bytes()[:500])
    with config.open('a') as file:
        file.write("model = dict(encoder=dict(schedule='H3L1-(2+1)x3'))\n")
    result = run(config, '--workers', 2, '--json', tmp_path / 'report.json')
    assert result.exit_code == 1
    assert 'truncated image' in result.output
    assert '2 kinds of problems' in result.output
    report = json.loads((tmp_path / 'report.json').read_text())
    found = {finding['kind']: finding for finding in report['findings']}
    assert found['truncated image']['places'] == [str(image)]
    assert found['truncated image']['data'] == 'val, test'
    assert 'H3L1-(2+1)x3' in found['model']['places'][0]


def test_config_that_does_not_exist(tmp_path):
    result = run(tmp_path / 'none.py')
    assert result.exit_code == 1
    assert 'does not exist' in result.output
    assert 'Traceback' not in result.output


def test_says_what_it_did_not_read(config):
    with config.open('a') as file:
        file.write(
            "train_dataloader = dict(dataset=dict(_delete_=True, type='ODVGDataset', "
            "data_root='nowhere', ann_file='train.jsonl'))\n"
        )
    result = run(config, '--workers', 1)
    assert result.exit_code == 0, result.output
    assert 'No problems found in what was checked, without train' in result.output
    assert 'ODVGDataset' in result.output
