from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

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
    names = [r['name'] for r in report['results'] if r['direction'] == 'inference']
    assert names == [
        'stock (mmcv)',
        'stock (ms_deform_attn)',
        'Lite H3L1-(2+1)x3',
        'Lite H3L1-(2+1)x3, no KDA',
    ]
    flops = {r['name']: r['flops'] for r in report['results']}
    assert flops['stock (mmcv)'] == flops['stock (ms_deform_attn)']
    assert flops['Lite H3L1-(2+1)x3'] < flops['stock (mmcv)']
    assert set(report['profile']) == set(names)
    assert report['matmul_peak'] > 0


def test_transformers(tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    import transformers_models as models

    from mmlite.analysis import huggingface

    small = {
        'deformable-detr': ('model.encoder', models.deformable_detr, 'H3L1-(2+1)x2'),
        'grounding-dino': ('model.encoder', models.grounding_dino, 'H3L1-(2+1)x2'),
        'mask2former': ('model.pixel_level_module.decoder', models.mask2former, 'H2L1-(2+1)x2'),
    }
    for name, (encoder, build, schedule) in small.items():
        assert huggingface.MODELS[name].encoder == encoder
        kind = huggingface.Kind(name, build, schedule, encoder)
        monkeypatch.setitem(huggingface.MODELS, name, kind)
    path = tmp_path / 'transformers.json'
    size = ('--image-size', '64x96', '--rounds', '2', '--warmup', '1')
    result = run('transformers', *size, '--json', str(path))
    assert result.exit_code == 0, result.output
    assert result.output.count('differ by at most') == 3
    found = json.loads(path.read_text())['results']
    assert [r['model'] for r in found] == [name for name in small for _ in range(3)]
    for stock, patched, lite in (found[0:3], found[3:6], found[6:9]):
        assert [r['variant'] for r in (stock, patched)] == ['stock', 'patched']
        assert lite['variant'] == f'Lite {small[stock["model"]][2]}'
        assert stock['encoder_flops'] == patched['encoder_flops'] > lite['encoder_flops'] > 0
        assert patched['difference'] < 1e-5
        for r in (stock, patched, lite):
            assert len(r['encoder_timing']['seconds']) == len(r['timing']['seconds']) == 2
            assert r['encoder_timing']['mean'] < r['timing']['mean']


def test_transformers_without_our_kernels(monkeypatch):
    pytest.importorskip('transformers')
    import transformers_models as models

    from mmlite import ops
    from mmlite.analysis import huggingface

    kind = huggingface.Kind('tiny', models.deformable_detr, 'H3L1-(2+1)x2', 'model.encoder')
    monkeypatch.setitem(huggingface.MODELS, 'deformable-detr', kind)
    monkeypatch.setattr(ops, 'backends', lambda: [ops.BackendStatus('cpu', False, 'out of order')])
    size = ('--image-size', '64x96', '--rounds', '2', '--warmup', '1')
    result = run('transformers', 'deformable-detr', *size)
    assert 'Our CPU kernels did not run: out of order.' in result.output


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('ops', '--image-size', 'wide'), "'wide' is not a size"),
        (('ops', '--image-size', '32x48', '--queries', '999'), 'queries must be between'),
        (('ops', '--device', 'cuda:99'), "device 'cuda:99' cannot be used here"),
        (('transformers', 'nobody'), "there is no model 'nobody'; choose among deformable-detr"),
        (('encoder', '--schedule', 'H9'), "schedule 'H9' is not of the form"),
    ],
)
def test_bad_input(arguments, message):
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert 'Traceback' not in result.output


@pytest.mark.parametrize('command', [(), ('ops',), ('encoder',), ('transformers',)])
def test_help_has_an_example(command):
    result = run(*command, '--help')
    assert result.exit_code == 0
    assert 'mmlite benchmark' in result.output.partition('Example')[2]


LITE = """
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(
    type='LiteDeformableDETR',
    num_queries=20,
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[128, 256, 512]),
    encoder=dict(num_layers=2, schedule='H3L1-(2+1)x1'),
    decoder=dict(num_layers=1),
)
"""


@pytest.mark.timeout(900)
def test_deploy(tmp_path, monkeypatch):
    pytest.importorskip('onnxscript')
    from mmlite.analysis import deploy
    from mmlite.export import library

    for runtime in ('onnxruntime', 'openvino'):
        pytest.importorskip(runtime)
        try:
            library(runtime)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    config, path = tmp_path / 'lite.py', tmp_path / 'deploy.json'
    config.write_text(LITE)

    def measured(part: str, runtime: str) -> dict[tuple[str, str, str], dict]:
        result = run(
            *('deploy', str(config), '--part', part, '--runtime', 'pytorch', '--runtime', runtime),
            *('--image-size', '64x96', '--rounds', '2', '--warmup', '1', '--threads', '1'),
            *('--json', str(path), '--exports', str(tmp_path / 'exports')),
        )
        assert result.exit_code == 0, result.output
        found = {}
        for result in json.loads(path.read_text())['results']:
            who = result['contestant']
            found[who['runtime'], who['model'].split()[0], who['form']] = result
            assert len(result['timing']['seconds']) == 2
        return found

    encoders = measured('encoder', 'onnxruntime')
    for model in ('stock', 'Lite'):
        for form in ('plain', 'portable', 'our operator'):
            result = encoders['ONNX Runtime', model, form]
            assert result['over_stock'] and result['over_plain']
    assert encoders['PyTorch', 'stock', "MMDetection's way"]['over_stock']['median'] == 1

    # Whole detectors are exported likewise; one of them is enough.
    everyone = deploy._contestants
    monkeypatch.setattr(
        deploy,
        '_contestants',
        lambda *arguments: [
            who for who in everyone(*arguments) if who.model != 'stock' and not who.portable
        ],
    )
    detectors = measured('detector', 'openvino')
    assert {form for _, _, form in detectors} == {"MMDetection's way", 'optimised', 'our operator'}
    for result in detectors.values():
        assert all(result['stages'][stage] > 0 for stage in ('backbone', 'encoder', 'decoder'))

    refused = run('deploy', str(config), '--dtype', 'bfloat16')
    assert 'leave out --device, --dtype and --batch-size' in ' '.join(refused.output.split())
    stock = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
    assert 'give a Lite config' in run('deploy', stock, '--runtime', 'pytorch').output
