import json

import pytest
from click.testing import CliRunner

from mmlite.cli import main


def run(*arguments: str):
    return CliRunner().invoke(main, ['benchmark', *arguments])


def test_operators(tmp_path):
    path, markdown = tmp_path / 'ops.json', tmp_path / 'ops.md'
    files = ('--json', str(path), '--markdown', str(markdown))
    result = run('ops', '--image-size', '32x48', '--rounds', '2', '--threads', '1', *files)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    measured = {(r['operator'], r['backend']): r['timings'] for r in report['results']}
    for name in (
        ('ms_deform_attn', 'mmcv'),
        ('ms_deform_attn', 'reference'),
        ('key_aware_deform_attn', 'reference'),
    ):
        for part in ('forward', 'forward+backward'):
            assert len(measured[name][part]['1']['seconds']) == 2
    assert report['machine']['threads'] == '1'
    tables = markdown.read_text()
    assert '| key_aware_deform_attn | reference |' in tables and tables in result.output


def test_encoder(tmp_path):
    path = tmp_path / 'encoder.json'
    options = ('--rounds', '2', '--ffn', '64', '--train', '--profile', '--json', str(path))
    result = run('encoder', '--image-size', '32x48', *options)
    assert result.exit_code == 0, result.output
    assert result.output.count('Self CPU time total') == 4
    results = json.loads(path.read_text())['results']
    lite = 'Lite H3L1-(2+1)x3'
    names = ['stock (mmcv)', 'stock (ms_deform_attn)', lite, f'{lite}, no KDA']
    assert [result['name'] for result in results] == names
    flops = [result['complexity']['flops'] for result in results]
    assert flops[0] == flops[1] > flops[2] > flops[3]
    for result in results:
        assert result['complexity']['stage_flops']['encoder'] == result['complexity']['flops']
        timings = [result['timings'][part]['1'] for part in ('inference', 'training')]
        assert all(len(timing['seconds']) == 2 for timing in timings)
        ours = timings[0]['faster']['faster than stock, our op']['median']
        assert (ours == 1) == (result['name'] == names[1])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('ops', '--image-size', '0', '48'), '0 is not in the range'),
        (('ops', '--image-size', '32x48', '--queries', '999'), 'queries must be at most'),
        (('ops', '--batch-size', '1', '--batch-size', '2'), 'ops takes one --batch-size'),
        (('ops', '--device', 'cuda:99'), "device 'cuda:99' cannot be used here"),
        (('encoder', '--schedule', 'H9'), "schedule 'H9' is not of the form"),
    ],
)
def test_bad_input(arguments, message):
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert 'Traceback' not in result.output
