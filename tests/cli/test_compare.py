import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from exported import needs
from mmdet.datasets import CocoDataset
from PIL import Image
from small_detectors import write_pair

from mmlite import ops
from mmlite.cli import main
from mmlite.export import export_detector
from mmlite.openmmlab.build import build_detector, load_config

SMALL = ('--image-size', '64x96')
QUICK = (*SMALL, '--rounds', '2', '--warmup', '1', '--threads', '1')
COCO = {'model.bbox_head.num_classes': 80}


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp('configs'), 'plain', **COCO)


@pytest.fixture(scope='module')
def checkpoint(configs, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'stock.pth'
    torch.save({'state_dict': build_detector(load_config(configs[0])).state_dict()}, path)
    return path


def run(*arguments: str):
    return CliRunner().invoke(main, ['benchmark', 'compare', *map(str, arguments)])


def results(*arguments: str, path: Path) -> list[dict]:
    result = run(*arguments, '--json', path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())['results']


@pytest.fixture(scope='module')
def report(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    paths = {kind: folder / f'report.{kind}' for kind in ('json', 'html')}
    options = [word for kind, path in paths.items() for word in (f'--{kind}', path)]
    modes = ('--mode', 'eager', '--mode', 'optimized', '--train')
    result = run(*configs, *QUICK, *modes, '--batch-size', '1', '--batch-size', '2', *options)
    assert result.exit_code == 0, result.output
    return {**paths, 'output': result.output}


def test_json_and_tables(report):
    content = json.loads(report['json'].read_text())['results']
    names = ['stock', 'stock, optimized', 'lite', 'lite, optimized']
    assert [result['name'] for result in content] == names
    encoders = [result['complexity']['stage_flops']['encoder'] for result in content]
    assert encoders[0] == encoders[1] > encoders[2] == encoders[3]
    for result in content:
        assert result['complexity']['level_tokens'] == [96, 24, 6, 2]
        # What is optimised cannot be trained.
        parts = {'inference'} if 'optimized' in result['name'] else {'inference', 'training'}
        assert set(result['timings']) == parts
        for timings in result['timings'].values():
            assert [len(timings[batch]['seconds']) for batch in '12'] == [2, 2]
            ratio = timings['1']['faster']['faster']['median']
            assert (ratio == 1) == (result['name'] == 'stock')
    for title in ('GFLOPs, whole and by stage', 'Inference, 64x96, batch 2', 'Training, 64x96'):
        assert title in report['output']


@pytest.mark.parametrize('family', ['DDQ', 'Mask2Former', 'GroundingDINO'])
def test_the_newer_families(family, tmp_path, tiny_bert):
    # Grounding DINO is asked for COCO's classes.
    own = {'bert': tiny_bert, **COCO} if family == 'GroundingDINO' else {}
    parts = ('--part', 'inference', '--part', 'encoder', '--train')
    pair = write_pair(tmp_path, family, **own)
    for result in results(*pair, *QUICK, *parts, path=tmp_path / 'report.json'):
        cost, times = result['complexity']['stage_flops'], result['timings']
        assert sum(cost.values()) == result['complexity']['flops']
        assert all(cost[stage] > 0 for stage in ('backbone', 'neck', 'encoder', 'decoder', 'head'))
        assert list(times) == ['inference', 'encoder', 'training']
        assert all(timings['1']['median'] > 0 for timings in times.values())


def test_page_stands_alone(report):
    text = report['html'].read_text()
    assert '<table' in text and '<script' not in text and 'width=device-width' in text
    links = re.findall(r'(?:src|href)="(.)|url\((.)', text)
    assert all(first in '#' for link in links for first in link)
    assert '<span title="encoder"' in text  # a bar


def test_runtimes_run_exports_that_are_kept(configs, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    options = (configs[1], *QUICK, '--runtime', 'pytorch', '--runtime', 'onnxruntime')
    found = results(*options, path=tmp_path / 'report.json')
    exports = ['stock, onnxruntime, plain', 'lite, onnxruntime, ours']
    assert [each['name'] for each in found] == ['stock', 'lite', *exports]
    for each in found:
        ratio = each['timings']['inference']['1']['faster']['faster']['median']
        assert (ratio == 1) == (each['name'] == 'stock')
    written = {file: file.stat().st_mtime for file in tmp_path.glob('work_dirs/exports/*/*')}
    assert len(written) >= 4
    options += '--form', 'ours'
    names = [each['name'] for each in results(*options, path=tmp_path / 'report.json')]
    assert names[2:] == ['stock, onnxruntime, ours', exports[1]]
    assert {file: file.stat().st_mtime for file in written} == written
    result = run(*configs, *QUICK, '--int8')
    assert result.exit_code and '--int8 is for OpenVINO' in result.output


def test_kernels_that_do_not_run_are_named(configs, monkeypatch):
    down = ops.BackendStatus('cpu', False, 'out of order')
    monkeypatch.setattr(ops, 'backends', lambda: [down])
    result = run(*configs, *SMALL, '--count-only')
    assert 'Our CPU kernels did not run: out of order.' in result.output


def test_preset_counts_published_rows(tmp_path):
    path, markdown = tmp_path / 'table3.json', tmp_path / 'table3.md'
    options = ('--preset', 'paper-table3', '--count-only', '--image-size', '128x192')
    rows = results(*options, '--markdown', markdown, path=path)
    assert [row['published']['ap'] for row in rows] == [46.8, 45.8, 45.9, 46.2, 46.7]
    # The measured order is the published one.
    measured = [row['complexity']['stage_flops']['encoder'] for row in rows]
    published = [row['published']['encoder_gflops'] for row in rows]
    assert sorted(range(5), key=measured.__getitem__) == sorted(range(5), key=published.__getitem__)
    for row in rows:
        params = row['complexity']['params'] / 1e6
        assert params == pytest.approx(row['published']['params'], abs=1.3)
    text = markdown.read_text()
    assert 'Published figures are' in text
    last = text.rpartition('| Lite H3L1-(2+1)x3, R50 | ')[2].split(' | ')
    assert [last[i] for i in (0, 1, 3, 5, 7)] == ['46.7', '123', '39', '57%', '41']
    assert last[8].startswith('41.8')  # measured


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('', 'give the config of the baseline first'),
        ('STOCK --preset paper-table3', 'give either configs'),
        ('STOCK --schedule H3L1-(2+1)x3', 'a config has its own'),
        ('. STOCK', 'give the config of the baseline first'),
        ('nowhere.py', 'config file nowhere.py does not exist'),
        ('STOCK,nowhere.pth', 'nowhere.pth does not exist'),
        ('LITE,CHECKPOINT', 'does not fit lite.py'),
        ('STOCK --annotations a.json', 'go together'),
        ('STOCK --annotations a.json --images .', 'holds no annotations'),
        ('STOCK --cfg-options model.backbone.depth=7', 'invalid depth 7'),
    ],
)
def test_bad_input(configs, checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    image = {'id': 1, 'file_name': '1.png', 'width': 9, 'height': 9}
    content = {'images': [image], 'categories': [{'id': 1, 'name': 'cat'}], 'annotations': []}
    (tmp_path / 'a.json').write_text(json.dumps(content))
    for name, path in {'STOCK': configs[0], 'LITE': configs[1], 'CHECKPOINT': checkpoint}.items():
        arguments = arguments.replace(name, str(path))
    result = run(*arguments.split(), *SMALL, '--count-only')
    assert result.exit_code != 0
    assert message in ' '.join(result.output.split())
    assert 'Traceback' not in result.output


def test_accuracy(configs, checkpoint, tmp_path):
    """A detector with random weights has an AP, of about nothing."""
    Image.new('RGB', (96, 64), 'gray').save(tmp_path / 'image.png')
    names = CocoDataset.METAINFO['classes']
    box = {'id': 1, 'image_id': 1, 'category_id': 1, 'iscrowd': 0, 'bbox': [9, 9, 40, 30]}
    content = {
        'images': [{'id': 1, 'file_name': 'image.png', 'width': 96, 'height': 64}],
        'categories': [{'id': i + 1, 'name': name} for i, name in enumerate(names)],
        'annotations': [{**box, 'area': 1200}],
    }
    annotations = tmp_path / 'val.json'
    annotations.write_text(json.dumps(content))
    data = ('--annotations', annotations, '--images', tmp_path, '--count-only')
    models = (f'{configs[0]},{checkpoint}', configs[1])
    measured, not_measured = results(*models, *SMALL, *data, path=tmp_path / 'report.json')
    assert 0 <= measured['accuracy']['mAP'] <= 100
    assert not_measured['accuracy'] is None


def test_exports(configs, tmp_path):
    """A folder of an export is a variant, and a single Lite config gets its stock one."""
    needs('onnx')
    config, folder = load_config(configs[1]), tmp_path / 'exported'
    export_detector(build_detector(config), folder, 'onnx', config, (64, 96))
    found = results(configs[1], folder, *QUICK, '--train', path=tmp_path / 'report.json')
    assert [result['name'] for result in found] == ['stock', 'lite', str(folder)]
    assert found[2]['complexity'] is None
    assert list(found[2]['timings']) == ['inference']
    refused = run(configs[1], folder, *QUICK, '--image-size', '96x96')
    assert 'needs that --image-size' in ' '.join(refused.output.split())
