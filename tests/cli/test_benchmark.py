import json

import pytest
from commands import mmlite, refused


def test_operators(tmp_path):
    path, markdown = tmp_path / 'ops.json', tmp_path / 'ops.md'
    options = ('--image-size', '32x48', '--rounds', 2, '--threads', 1)
    output = mmlite('benchmark', 'ops', *options, '--json', path, '--markdown', markdown)
    report = json.loads(path.read_text())
    measured = {(r['operator'], r['backend']): r['timings'] for r in report['results']}
    assert len(measured) == len(report['results'])
    for name in (
        ('ms_deform_attn', 'mmcv'),
        ('ms_deform_attn', 'reference'),
        ('key_aware_deform_attn', 'reference'),
    ):
        for part in ('forward', 'forward+backward'):
            assert len(measured[name][part]['1']['seconds']) == 2
    for (_, backend), timings in measured.items():
        for timing in (part['1'] for part in timings.values()):
            ratio = timing['faster']['over PyTorch']['median']
            assert ratio > 0 and (ratio == 1) == (backend == 'reference')
    assert report['machine']['threads'] == '1'
    tables = markdown.read_text()
    assert '| key_aware_deform_attn | reference |' in tables and tables in output


def test_encoder(tmp_path):
    path = tmp_path / 'encoder.json'
    options = ('--rounds', 2, '--ffn', 64, '--train', '--profile', '--json', path)
    output = mmlite('benchmark', 'encoder', '--image-size', '32x48', *options)
    assert output.count('Self CPU time total') == 4
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
    refused(message, 'benchmark', *arguments)
