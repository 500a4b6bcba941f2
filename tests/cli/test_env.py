from __future__ import annotations

import json

from click.testing import CliRunner

from mmlite.cli import main


def test_says_what_is_there():
    result = CliRunner().invoke(main, ['env'])
    assert result.exit_code == 0, result.output
    for text in ('torch', 'mmdet', 'reference'):
        assert text in result.output
    result = CliRunner().invoke(main, ['env', '--json'])
    assert json.loads(result.output)


def test_writes_the_same_for_programs(tmp_path):
    result = CliRunner().invoke(main, ['env', '--json', str(tmp_path / 'env.json')])
    assert 'Backends' in result.output
    assert 'versions' in json.loads((tmp_path / 'env.json').read_text())
