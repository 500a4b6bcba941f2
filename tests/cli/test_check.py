import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmlite.cli import main
from mmlite.datasets import generate_shapes

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Checks a config with a change: the exit code, what is printed, and the report."""
    monkeypatch.chdir(tmp_path)
    generate_shapes('data/shapes', {'train': 3, 'val': 2})
    base = CONFIGS / 'small/lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'

    def run(change=''):
        Path('config.py').write_text(f'_base_ = {str(base)!r}\n{change}')
        done = CliRunner().invoke(main, ['check', 'config.py', '--json', 'report.json'])
        return done.exit_code, done.output, json.loads(Path('report.json').read_text())

    return run


def test_all_is_well(run):
    code, output, report = run()
    assert code == 0, output
    assert 'No problems found\n' in output and 'triangle' in output
    assert report['problems'] == 0
    assert [data['name'] for data in report['data']] == ['train', 'val, test']


def test_problems_in_the_data_and_the_model(run):
    image = Path('data/shapes/val/00001.png')
    image.write_bytes(image.read_bytes()[:500])
    path = Path('data/shapes/annotations/instances_train.json')
    path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 0, "bbox": [1]', 5))
    code, output, report = run("model = dict(encoder=dict(schedule='H3L1-(2+1)x3'))\n")
    assert code == 1
    assert '3 kinds of problems' in output and 'and 2 more' in output
    found = {finding['kind']: finding for finding in report['findings']}
    assert found['truncated image']['places'] == [str(image)]
    assert found['truncated image']['data'] == 'val, test'
    assert 'H3L1-(2+1)x3' in found['model']['places'][0]
