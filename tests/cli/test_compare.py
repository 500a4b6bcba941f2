"""``mmlite benchmark compare`` from configs to the page."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import struct
import subprocess

import pytest
import torch
from click.testing import CliRunner

from mmlite.cli import main
from mmlite.openmmlab.build import build_detector, load_config

TINY = """
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(
    type='{type}',
    num_queries=20,
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[128, 256, 512]),
    encoder=dict(num_layers=2, {encoder}),
    decoder=dict(num_layers=1),
)
"""
VARIANT = "schedule='H3L1-(2+1)x1'"


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('configs')
    stock, lite = folder / 'stock.py', folder / 'lite.py'
    stock.write_text(TINY.format(type='DeformableDETR', encoder=''))
    lite.write_text(TINY.format(type='LiteDeformableDETR', encoder=VARIANT))
    return str(stock), str(lite)


def run(*arguments: str):
    return CliRunner().invoke(main, ['benchmark', 'compare', *arguments])


@pytest.fixture(scope='module')
def report(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    paths = {kind: folder / f'report.{kind}' for kind in ('json', 'markdown', 'html')}
    options = [word for kind, path in paths.items() for word in (f'--{kind}', str(path))]
    result = run(
        *configs,
        *('--image-size', '64x96', '--rounds', '2', '--threads', '1', '--train'),
        *('--batch-size', '1', '--batch-size', '2'),
        *options,
    )
    assert result.exit_code == 0, result.output
    return paths


def test_json(report):
    content = json.loads(report['json'].read_text())
    stock, lite = content['results']
    assert (stock['name'], lite['name']) == ('stock', 'lite')
    encoders = [r['complexity']['stage_flops']['encoder'] for r in (stock, lite)]
    assert encoders[1] < encoders[0]
    for result in (stock, lite):
        cost = result['complexity']
        assert cost['flops'] == sum(cost['stage_flops'].values())
        assert cost['level_tokens'] == [96, 24, 6, 2]
        assert set(result['latency']) == {'1', '2'}
        assert {'backbone', 'neck', 'encoder', 'encoder.layers.1', 'decoder'} <= set(
            result['stages']
        )
        assert len(result['training']['seconds']) == 2
        assert len(result['flops_by_size']) >= 2
    assert stock['faster']['1']['median'] == 1


MASK2FORMER = """
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(
    backbone=dict(depth=18, init_cfg=None),
    panoptic_head=dict(
        in_channels=[64, 128, 256, 512],
        num_queries=10,
        pixel_decoder=dict({pixel_decoder}),
        transformer_decoder=dict(num_layers=1),
    ),
    train_cfg=dict(num_points=64),
    test_cfg=dict(max_per_image=10),
)
"""
GROUNDING_DINO = """
_base_ = 'mmdet::grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(
    type='{type}',
    num_queries=20,
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[128, 256, 512]),
    language_model=dict(name={bert!r}),
    encoder=dict(num_layers=2, {encoder}),
    decoder=dict(num_layers=1),
    test_cfg=dict(max_per_img=20),
)
"""


DDQ = TINY.replace(
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py',
).replace('decoder=dict(num_layers=1)', 'decoder=dict(num_layers=2), test_cfg=dict(max_per_img=20)')


@pytest.mark.parametrize('family', ['ddq', 'mask2former', 'grounding_dino'])
def test_the_newer_families(family, tmp_path, tiny_bert):
    stock, lite, path = (tmp_path / name for name in ('stock.py', 'lite.py', 'report.json'))
    if family == 'mask2former':
        encoder = "type='LiteMSDeformAttnPixelDecoder', encoder=dict(num_layers=2, {})"
        encoder = encoder.format("schedule='H2L1-(2+1)x1'")
        stock.write_text(MASK2FORMER.format(pixel_decoder='encoder=dict(num_layers=2)'))
        lite.write_text(MASK2FORMER.format(pixel_decoder=encoder))
    elif family == 'ddq':
        stock.write_text(DDQ.format(type='DDQDETR', encoder=''))
        lite.write_text(DDQ.format(type='LiteDDQDETR', encoder=VARIANT))
    else:
        names = dict(bert=tiny_bert)
        stock.write_text(GROUNDING_DINO.format(type='GroundingDINO', encoder='', **names))
        lite.write_text(GROUNDING_DINO.format(type='LiteGroundingDINO', encoder=VARIANT, **names))
    options = ['--image-size', '64x96', '--rounds', '2', '--warmup', '1', '--threads', '1']
    options.append('--train')
    result = run(str(stock), str(lite), *options, '--json', str(path))
    assert result.exit_code == 0, result.output
    assert 'with neck, faster' in result.output.replace('\n', ' ')
    for result in json.loads(path.read_text())['results']:
        assert len(result['training']['seconds']) == 2
        stages, cost = result['stages'], result['complexity']['stage_flops']
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
    picture = tmp_path / 'page.png'
    # At the foot of the page a probe writes how wide the content came out.
    probed = tmp_path / 'page.html'
    probe = '<p id="probe"></p><script>probe.textContent = document.documentElement.scrollWidth + '
    probe += '"/" + document.documentElement.clientWidth</script></body>'
    probed.write_text(report['html'].read_text().replace('</body>', probe))
    options = [
        *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'),
        *('--disable-background-networking', '--disable-component-update', '--disable-sync'),
        *('--hide-scrollbars', f'--user-data-dir={tmp_path / "profile"}'),
        f'--window-size={width},1200',
    ]
    subprocess.run(
        [browser, *options, f'--screenshot={picture}', report['html'].as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    header = picture.read_bytes()[:24]
    assert struct.unpack('>II', header[16:])[0] == width
    assert picture.stat().st_size > 10_000  # an empty page compresses to less
    dom = subprocess.run(
        [browser, *options, '--dump-dom', probed.as_uri()],
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
    ('change', 'message'),
    [
        (lambda stock, lite, tmp: [], 'give either configs'),
        (lambda stock, lite, tmp: [stock, '--preset', 'paper-table3'], 'give either configs'),
        (lambda stock, lite, tmp: ['nowhere.py'], 'config nowhere.py does not exist'),
        (lambda stock, lite, tmp: [f'{stock},nowhere.pth'], 'nowhere.pth does not exist'),
        (lambda stock, lite, tmp: [stock, '--annotations', 'a.json'], 'go together'),
        (
            lambda stock, lite, tmp: [
                stock,
                *('--annotations', str(tmp / 'a.json'), '--images', str(tmp)),
            ],
            'holds no annotations',
        ),
    ],
)
def test_bad_input(configs, tmp_path, change, message):
    (tmp_path / 'a.json').write_text('{"images": [], "annotations": []}')
    result = run(*change(*configs, tmp_path), '--image-size', '64x96', '--count-only')
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
    from PIL import Image

    stock, lite = configs
    classes = load_config(stock).test_dataloader.dataset.get('metainfo', {}).get('classes')
    if classes is None:
        from mmdet.datasets import CocoDataset

        classes = CocoDataset.METAINFO['classes']
    Image.new('RGB', (96, 64), 'gray').save(tmp_path / 'image.png')
    annotations = tmp_path / 'annotations.json'
    annotations.write_text(
        json.dumps(
            {
                'images': [{'id': 1, 'file_name': 'image.png', 'width': 96, 'height': 64}],
                'categories': [{'id': i + 1, 'name': name} for i, name in enumerate(classes)],
                'annotations': [
                    {
                        **{'id': 1, 'image_id': 1, 'category_id': 1, 'iscrowd': 0},
                        **{'bbox': [10, 10, 40, 30], 'area': 1200},
                    }
                ],
            }
        )
    )
    checkpoint = tmp_path / 'stock.pth'
    torch.save({'state_dict': build_detector(load_config(stock)).state_dict()}, checkpoint)
    path = tmp_path / 'report.json'
    result = run(
        *(f'{stock},{checkpoint}', lite, '--image-size', '64x96', '--count-only'),
        *('--annotations', str(annotations), '--images', str(tmp_path), '--json', str(path)),
    )
    assert result.exit_code == 0, result.output
    measured, not_measured = json.loads(path.read_text())['results']
    assert 0 <= measured['accuracy']['mAP'] <= 100
    assert not_measured['accuracy'] is None
