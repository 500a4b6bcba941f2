import json
from pathlib import Path

import cv2
import pytest
from commands import mmlite, refused
from small_detectors import write_pair

from mmlite.datasets import CLASSES, generate_shapes

CHANGES = {
    'model.bbox_head.num_classes': len(CLASSES),
    'model.test_cfg.max_per_img': 10,
    'test_dataloader.dataset.metainfo': {'classes': CLASSES},
    'test_dataloader.dataset.pipeline.1.scale': (192, 192),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('visualize')
    generate_shapes(folder, {'val': 2}, image_size=128)
    write_pair(folder, 'plain', **CHANGES)
    return folder


@pytest.fixture(scope='module')
def image(folder) -> Path:
    return min((folder / 'val').iterdir())


def check_pictures(out: Path) -> None:
    pixels = cv2.imread(str(out))
    assert pixels.std() > 10  # something is drawn
    page = out.with_suffix('.html').read_text()
    assert 'src="data:image/png;base64,' in page
    assert '://' not in page


# In the first layer of a block the point falls on level 2: no low-level token is a query.
@pytest.mark.parametrize('query', [('--layer', '0'), ('--point', '30,90'), ('--object', '0')])
def test_attention(folder, image, tmp_path, query):
    out = tmp_path / 'attention.png'
    options = ('--against', folder / 'stock.py', *query, '--out', out)
    mmlite('visualize', 'attention', folder / 'lite.py', image, *options)
    check_pictures(out)


def test_detections(folder, image, tmp_path):
    out = tmp_path / 'detections.png'
    annotations = folder / 'annotations' / 'instances_val.json'
    options = ('--annotations', annotations, '--score', 0, '--out', out)
    mmlite('visualize', 'detections', folder / 'lite.py', image, *options)
    check_pictures(out)


def test_levels(folder, tmp_path):
    out, path = tmp_path / 'levels.png', tmp_path / 'levels.json'
    options = ('--against', folder / 'stock.py', '--out', out, '--json', path)
    mmlite('visualize', 'levels', folder / 'lite.py', folder / 'val', *options)
    check_pictures(out)
    content = json.loads(path.read_text())
    assert content['images'] == 2
    lite, stock = content['masses'].values()
    assert lite[0][0] == [None] * 4  # layer 1 leaves the low level alone
    assert stock[0][0] == pytest.approx([0.25] * 4)  # untrained weights are even


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('attention lite.py IMAGE --point 1,2 --object 0', 'not both'),
        ('attention lite.py IMAGE --point 500,2', 'is outside the image of 128x128'),
        ('attention lite.py IMAGE --point left', 'write x,y in pixels'),
        ('attention lite.py IMAGE --layer 7', 'layer must be between 0 and 1'),
        ('attention lite.py IMAGE --layer 0 --level 0', 'does not update level'),
        ('attention lite.py IMAGE --level 9', 'level must be between 0 and 3'),
        ('attention lite.py IMAGE --level=-1', 'level must be between 0 and 3'),
        ('attention lite.py IMAGE --object 99', 'object must be between 0 and 9'),
        ('attention lite.py nothing.png', "File 'nothing.png' does not exist"),
        ('attention lite.py lite.py', 'cannot be read as an image'),
        ('attention lite.py no.pth IMAGE', 'no.pth does not exist'),
        ('attention lite.py a.pth b.pth IMAGE', 'at most one CHECKPOINT'),
        ('attention mmdet::retinanet/retinanet_r18_fpn_1x_coco.py IMAGE', 'no multi-scale encoder'),
        ('levels mmdet::detr/detr_r50_8xb2-150e_coco.py val', 'there are none'),
        ('detections lite.py,no.pth IMAGE', 'no.pth does not exist'),
        ('detections lite.py IMAGE --annotations no.json', 'no.json does not exist'),
        ('levels lite.py annotations', 'there are no images'),
        ('levels lite.py nowhere', "Directory 'nowhere' does not exist"),
    ],
)
def test_bad_input(folder, image, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    refused(message, 'visualize', *arguments.replace('IMAGE', str(image)).split())
