"""``mmlite benchmark compare`` from configs to the page."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess

import pytest
import torch
from click.testing import CliRunner
from mmdet.datasets import CocoDataset
from PIL import Image
from small_detectors import write_pair

from mmlite.cli import main
from mmlite.openmmlab.build import build_detector, load_config

QUICK = ('--image-size', '64x96', '--rounds', '2', '--warmup', '1', '--threads', '1', '--train')
COCO = {'model.bbox_head.num_classes': 80}


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('configs')
    return write_pair(folder, 'plain', **COCO)


def run(*arguments: str):
    return CliRunner().invoke(main, ['benchmark', 'compare', *arguments])


@pytest.fixture(scope='module')
def report(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    paths = {kind: folder / f'report.{kind}' for kind in ('json', 'markdown', 'html')}
    options = [word for kind, path in paths.items() for word in (f'--{kind}', str(path))]
    result = run(*configs, *QUICK, '--batch-size', '1', '--batch-size', '2', *options)
    assert result.exit_code == 0, result.output
    return paths


def test_json(report):
    content = json.loads(report['json'].read_text())
    stock, lite = content['results']
    assert (stock['name'], lite['name']) == ('stock', 'lite')
    encoders = [r['complexity']['stage_flops']['encoder'] for r in (stock, lite)]
    assert encoders[1] < encoders[0]
    for result in (stock, lite):
        assert result['complexity']['level_tokens'] == [96, 24, 6, 2]
        assert set(result['latency']) == {'1', '2'}
        assert len(result['flops_by_size']) >= 2
    assert stock['faster']['1']['median'] == 1


@pytest.mark.parametrize('family', ['DDQ', 'Mask2Former', 'GroundingDINO'])
def test_the_newer_families(family, tmp_path, tiny_bert):
    path, own = tmp_path / 'report.json', {}
    if family == 'GroundingDINO':  # asked for COCO's classes
        own = {'bert': tiny_bert, **COCO}
    configs = write_pair(tmp_path, family, **own)
    result = run(*configs, *QUICK, '--json', str(path))
    assert result.exit_code == 0, result.output
    assert 'with neck, faster' in result.output.replace('\n', ' ')
    for result in json.loads(path.read_text())['results']:
        assert len(result['training']['seconds']) == 2
        stages, cost = result['stages'], result['complexity']['stage_flops']
        assert sum(cost.values()) == result['complexity']['flops']
        for stage in ('backbone', 'neck', 'encoder', 'decoder', 'head'):
            assert stages[stage] > 0, stage
            assert cost[stage] > 0, stage
        layers = stages['encoder.layers.0'] + stages['encoder.layers.1']
        assert 0 < layers <= stages['encoder']


def test_markdown(report):
    text = report['markdown'].read_text()
    for title in ('GFLOPs, whole and by stage', 'Inference, batch 2', 'Training step', 'Tokens of'):
        assert title in text


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href', 'xlink:href')]


def test_page_stands_alone(report):
    text = report['html'].read_text()
    page = _Page()
    page.feed(text)
    assert 'script' not in page.tags
    assert 'svg' in page.tags
    assert 'table' in page.tags
    assert all(link.startswith('#') for link in page.links)
    assert not re.findall(r'url\((?!#)', text)
    assert 'width=device-width' in text


@pytest.mark.parametrize('width', [390, 1200])
def test_page_in_a_browser(report, tmp_path, width):
    browser = shutil.which('chromium') or shutil.which('google-chrome')
    if browser is None:
        pytest.skip('no Chromium is installed to render the page')
    # At the foot of the page a probe writes how wide the content came out.
    probed = tmp_path / 'page.html'
    probe = '<p id="probe"></p><script>probe.textContent = document.documentElement.scrollWidth + '
    probe += '"/" + document.documentElement.clientWidth</script></body>'
    probed.write_text(report['html'].read_text().replace('</body>', probe))
    dom = subprocess.run(
        [
            *(browser, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars'),
            *(f'--user-data-dir={tmp_path / "profile"}', f'--window-size={width},1200'),
            *('--dump-dom', probed.as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    content, window = map(int, re.search(r'id="probe">(\d+)/(\d+)<', dom).groups())
    assert content <= window  # nothing sticks out sideways


def test_preset_counts_published_rows(tmp_path):
    path, page = tmp_path / 'table3.json', tmp_path / 'table3.html'
    result = run(
        *('--preset', 'paper-table3', '--count-only', '--image-size', '128x192'),
        *('--json', str(path), '--html', str(page)),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())['results']
    assert [row['published']['ap'] for row in rows] == [46.8, 45.8, 45.9, 46.2, 46.7]
    # The measured order is the published one.
    measured = [row['complexity']['stage_flops']['encoder'] for row in rows]
    published = [row['published']['encoder_gflops'] for row in rows]
    assert sorted(range(5), key=measured.__getitem__) == sorted(range(5), key=published.__getitem__)
    for row in rows:
        assert row['complexity']['params'] / 1e6 == pytest.approx(
            row['published']['params'], abs=1.3
        )
    assert 'Published' in page.read_text()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('', 'give either configs'),
        ('STOCK --preset paper-table3', 'give either configs'),
        ('nowhere.py', 'config nowhere.py does not exist'),
        ('STOCK,nowhere.pth', 'nowhere.pth does not exist'),
        ('STOCK --annotations a.json', 'go together'),
        ('STOCK --annotations a.json --images .', 'holds no annotations'),
        ('STOCK --cfg-options model.backbone.depth=7', 'invalid depth 7'),
    ],
)
def test_bad_input(configs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    image = {'id': 1, 'file_name': '1.png', 'width': 9, 'height': 9}
    content = {'images': [image], 'categories': [{'id': 1, 'name': 'cat'}], 'annotations': []}
    (tmp_path / 'a.json').write_text(json.dumps(content))
    arguments = arguments.replace('STOCK', configs[0]).split()
    result = run(*arguments, '--image-size', '64x96', '--count-only')
    assert result.exit_code != 0
    assert message in result.output
    assert 'Traceback' not in result.output


def test_checkpoint_of_another_model(configs, tmp_path):
    stock, lite = configs
    checkpoint = tmp_path / 'stock.pth'
    torch.save({'state_dict': build_detector(load_config(stock)).state_dict()}, checkpoint)
    result = run(f'{lite},{checkpoint}', '--image-size', '64x96', '--count-only')
    assert result.exit_code != 0
    assert 'does not fit lite.py' in result.output


def test_accuracy(configs, tmp_path):
    """A detector with random weights has an AP, of about nothing."""
    stock, lite = configs
    Image.new('RGB', (96, 64), 'gray').save(tmp_path / 'image.png')
    names = CocoDataset.METAINFO['classes']
    box = {'id': 1, 'image_id': 1, 'category_id': 1, 'iscrowd': 0, 'bbox': [9, 9, 40, 30]}
    content = {
        'images': [{'id': 1, 'file_name': 'image.png', 'width': 96, 'height': 64}],
        'categories': [{'id': i + 1, 'name': name} for i, name in enumerate(names)],
        'annotations': [{**box, 'area': 1200}],
    }
    annotations, checkpoint, path = (tmp_path / n for n in ('val.json', 'stock.pth', 'report.json'))
    annotations.write_text(json.dumps(content))
    torch.save({'state_dict': build_detector(load_config(stock)).state_dict()}, checkpoint)
    result = run(
        *(f'{stock},{checkpoint}', lite, '--image-size', '64x96', '--count-only'),
        *('--annotations', str(annotations), '--images', str(tmp_path), '--json', str(path)),
    )
    assert result.exit_code == 0, result.output
    measured, not_measured = json.loads(path.read_text())['results']
    assert 0 <= measured['accuracy']['mAP'] <= 100
    assert not_measured['accuracy'] is None
