from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from small_detectors import write_pair

from mmlite.cli import main


def run(*arguments: str):
    return CliRunner().invoke(main, ['benchmark', *arguments])


def test_operators(tmp_path):
    path, markdown = tmp_path / 'ops.json', tmp_path / 'ops.md'
    result = run(
        *('ops', '--image-size', '32x48', '--rounds', '2', '--threads', '1', '--scaling'),
        *('--json', str(path), '--markdown', str(markdown)),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    measured = {(r['operator'], r['backend'], r['direction']) for r in report['results']}
    for operator in ('ms_deform_attn', 'key_aware_deform_attn'):
        for direction in ('forward', 'forward+backward'):
            assert (operator, 'reference', direction) in measured
    assert ('ms_deform_attn', 'mmcv', 'forward') in measured
    axes = {point['axis'] for point in report['scaling']}
    assert axes == {'image_size', 'num_queries', 'threads'}
    assert report['machine']['threads'] == '1'
    assert all(len(r['timing']['seconds']) == 2 for r in report['results'])
    assert '| key_aware_deform_attn | reference |' in markdown.read_text()


def test_encoder(tmp_path):
    path = tmp_path / 'encoder.json'
    result = run(
        *('encoder', '--image-size', '32x48', '--rounds', '2', '--ffn', '64', '--train'),
        *('--profile', '--json', str(path)),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    names = [r['name'] for r in report['results']]
    assert names == [
        'stock (mmcv)',
        'stock (ms_deform_attn)',
        'Lite H3L1-(2+1)x3',
        'Lite H3L1-(2+1)x3, no KDA',
    ]
    flops = {r['name']: r['complexity']['flops'] for r in report['results']}
    assert flops['stock (mmcv)'] == flops['stock (ms_deform_attn)']
    assert flops['Lite H3L1-(2+1)x3'] < flops['stock (mmcv)']
    for result in report['results']:
        assert result['complexity']['stage_flops']['encoder'] == result['complexity']['flops']
        assert sum(result['complexity']['encoder_layer_flops']) == result['complexity']['flops']
        assert len(result['latency']['1']['seconds']) == len(result['training']['seconds']) == 2
    assert set(report['profile']) == set(names)
    assert report['matmul_peak'] > 0


def transformers_kinds(monkeypatch, *names: str) -> dict:
    """Small models in place of those that are measured."""
    pytest.importorskip('transformers')
    import transformers_models as models

    from mmlite.analysis import huggingface

    small = {
        'deformable-detr': (models.deformable_detr, 'H3L1-(2+1)x2'),
        'grounding-dino': (models.grounding_dino, 'H3L1-(2+1)x2'),
        'mask2former': (models.mask2former, 'H2L1-(2+1)x2'),
    }
    for name, (build, schedule) in small.items():
        kind = replace(huggingface.MODELS[name], title=name, schedule=schedule)
        object.__setattr__(kind, 'build', build)
        monkeypatch.setitem(huggingface.MODELS, name, kind)
    return small


TRANSFORMERS = ('compare', '--framework', 'transformers', '--image-size', '64x96')


def test_transformers(tmp_path, monkeypatch):
    small = transformers_kinds(monkeypatch)
    path = tmp_path / 'transformers.json'
    rounds = ('--rounds', '2', '--warmup', '1', '--part', 'detector', '--part', 'encoder')
    result = run(*TRANSFORMERS, *rounds, '--json', str(path))
    assert result.exit_code == 0, result.output
    assert result.output.count('differ by at most') == 3
    found = json.loads(path.read_text())['results']
    assert len(found) == 9
    for name, (stock, fused, lite) in zip(small, (found[0:3], found[3:6], found[6:9])):
        assert (stock['name'], fused['name']) == (name, f'{name}, fused')
        assert lite['name'] == f'{name}, Lite {small[name][1]}'
        encoders = [r['complexity']['stage_flops']['encoder'] for r in (stock, fused, lite)]
        assert encoders[0] == encoders[1] > encoders[2] > 0
        assert fused['difference'] < 1e-5
        for r in (stock, fused, lite):
            assert len(r['encoder']['seconds']) == len(r['latency']['1']['seconds']) == 2
            assert r['encoder']['mean'] < r['latency']['1']['mean']
            assert all(r['stages'][stage] > 0 for stage in ('backbone', 'encoder', 'decoder'))


def test_without_our_kernels(monkeypatch):
    from mmlite import ops

    transformers_kinds(monkeypatch)
    monkeypatch.setattr(ops, 'backends', lambda: [ops.BackendStatus('cpu', False, 'out of order')])
    result = run(*TRANSFORMERS, 'deformable-detr', '--count-only')
    assert 'Our CPU kernels did not run: out of order.' in result.output


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('ops', '--image-size', '0', '48'), '0 is not in the range'),
        (('ops', '--image-size', '32x48', '--queries', '999'), 'queries must be at most'),
        (('ops', '--device', 'cuda:99'), "device 'cuda:99' cannot be used here"),
        ((*TRANSFORMERS, 'nobody'), "there is no model 'nobody'; choose among deformable-detr"),
        (('encoder', '--schedule', 'H9'), "schedule 'H9' is not of the form"),
    ],
)
def test_bad_input(arguments, message):
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert 'Traceback' not in result.output


@pytest.mark.timeout(900)
def test_runtimes(tmp_path, monkeypatch):
    pytest.importorskip('onnxscript')
    from mmlite.analysis import exported
    from mmlite.export import library

    for runtime in ('onnxruntime', 'openvino'):
        pytest.importorskip(runtime)
        try:
            library(runtime)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    _, config = write_pair(tmp_path, 'plain')
    path = tmp_path / 'compare.json'

    def measured(part: str, *options: str) -> dict[str, dict]:
        result = run(
            *('compare', str(config), '--part', part, '--runtime', 'pytorch', *options),
            *('--image-size', '64x96', '--rounds', '2', '--warmup', '1', '--threads', '1'),
            *('--json', str(path), '--exports', str(tmp_path / 'exports')),
        )
        assert result.exit_code == 0, result.output
        return {result['name']: result for result in json.loads(path.read_text())['results']}

    encoders = measured('encoder', '--runtime', 'onnxruntime')
    for model in ('stock', 'lite'):
        for form in ('plain', 'portable', 'our operator'):
            assert len(encoders[f'{model}, onnxruntime, {form}']['encoder']['seconds']) == 2
    assert not encoders['stock']['latency']  # the part alone

    # Whole detectors are exported likewise; one form is enough.
    monkeypatch.setattr(exported, 'FORMS', ('our operator',))
    modes = ('--mode', 'eager', '--mode', 'optimized')
    detectors = measured('detector', '--runtime', 'openvino', *modes)
    models = ('stock', 'lite')
    assert list(detectors) == [
        *(f'{model}{mode}' for model in models for mode in ('', ', optimized')),
        *(f'{model}, openvino, our operator' for model in models),
    ]
    for result in detectors.values():
        assert all(result['stages'][stage] > 0 for stage in ('backbone', 'encoder', 'decoder'))
        assert len(result['latency']['1']['seconds']) == 2

    refused = run('compare', str(config), '--runtime', 'openvino', '--dtype', 'bfloat16')
    assert 'leave out --device, --dtype and --batch-size' in ' '.join(refused.output.split())
