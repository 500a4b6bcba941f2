from __future__ import annotations

import json

from click.testing import CliRunner

from mmlite.cli import main


def test_says_what_is_there_to_people_and_programs(tmp_path):
    result = CliRunner().invoke(main, ['env', '--json', str(tmp_path / 'env.json')])
    assert result.exit_code == 0, result.output
    assert all(text in result.output for text in ('torch', 'mmdet', 'reference'))
    written = json.loads((tmp_path / 'env.json').read_text())
    printed = json.loads(CliRunner().invoke(main, ['env', '--json']).output)
    assert written['versions'] == printed['versions']
