from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from PIL import Image

from mmlite.datasets import CLASSES, check, generate_shapes
from mmlite.datasets.check import Findings, check_data, check_model
from mmlite.datasets.images import decode
from mmlite.openmmlab import families
from mmlite.openmmlab.build import build_detector

CONFIG = Path(__file__).parents[2] / (
    'configs/small/lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'
)


@pytest.fixture(autouse=True)
def decode_here(monkeypatch):
    """Processes of their own are for test_images.py; starting one takes a second."""
    monkeypatch.setattr(check, 'decode_images', lambda files, workers: map(decode, files))


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp('drawn')
    generate_shapes(root, {'train': 4, 'val': 2})
    return root


@pytest.fixture
def root(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / 'data')


@pytest.fixture
def config(root):
    config = Config.fromfile(CONFIG)
    for split in ('train', 'val', 'test'):
        config[f'{split}_dataloader'].dataset.data_root = str(root)
    for split in ('val', 'test'):
        config[f'{split}_evaluator'].ann_file = str(root / 'annotations/instances_val.json')
    return config


def edit(root, change, split='train'):
    """Let ``change`` edit the content of an annotation file in place."""
    path = root / f'annotations/instances_{split}.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run(config):
    """Everything found, as ``{(data, kind): places}``, and the summaries."""
    findings = Findings()
    summaries = check_data(config, findings, workers=1)
    return findings, summaries


def test_nothing_to_find(config, root):
    found, (train, val) = run(config)
    assert found == {}
    assert (train.name, val.name) == ('train', 'val, test')
    report = train.as_json()
    assert (report['images'], val.as_json()['images']) == (4, 2)
    assert train.labels == train.config_classes == list(CLASSES)
    objects = json.loads((root / 'annotations/instances_train.json').read_text())['annotations']
    areas = [entry['area'] for entry in objects]
    total = {size: sum(count[size] for count in train.classes) for size in check.COUNTS[2:]}
    assert report['objects'] == total['objects'] == len(areas)
    assert total['small'] == sum(area < 32**2 for area in areas)
    assert total['large'] == sum(area >= 96**2 for area in areas)
    assert report['most_objects'] == max(Counter(o['image_id'] for o in objects).values())
    discs = {o['image_id'] for o in objects if o['category_id'] == 1}
    assert train.classes[0]['images'] == len(discs)


def first(**entries):
    return lambda content: content['annotations'][0].update(entries)


def drop(key, part='annotations'):
    return lambda content: content[part][0].pop(key)


def repeat(part, **entries):
    return lambda content: content[part].append({**content[part][0], **entries})


def without(key, value):
    def change(content):
        content['annotations'] = [a for a in content['annotations'] if a[key] != value]

    return change


HERE = r'object 1 in .*train/00000\.png'


@pytest.mark.parametrize(
    ('change', 'kind', 'place'),
    [
        # Images are 128 pixels wide and high; a pixel beyond is no matter.
        (first(bbox=[128, 5, 20, 20]), 'box outside the image', rf'{HERE}.*image 128x128'),
        (first(bbox=[5, 128, 20, 20]), 'box outside the image', HERE),
        (first(bbox=[-20, 5, 20, 20]), 'box outside the image', HERE),
        (first(bbox=[127, 5, 1, 20]), None, ''),
        (first(bbox=[100, 5, 29, 20]), None, ''),
        (first(bbox=[100, 5, 29.5, 20]), 'box partly outside', rf'{HERE}: \[100, 5, 29.5, 20\]'),
        (first(bbox=[5, 100, 20, 29]), None, ''),
        (first(bbox=[5, 100, 20, 29.5]), 'box partly outside', HERE),
        (first(bbox=[-1, -1, 60, 20]), None, ''),
        (first(bbox=[-1.5, 5, 60, 20]), 'box partly outside', HERE),
        (first(bbox=[5, -1.5, 60, 20]), 'box partly outside', HERE),
        (first(bbox=[10, 10, 1, 1]), None, ''),
        (first(bbox=[10, 10, 0.9, 20]), 'box without area', HERE),
        (first(bbox=[10, 10, 20, 0.9]), 'box without area', HERE),
        (first(area=0), 'box without area', HERE),
        (first(bbox=[10, 10, 20]), 'broken box', rf'{HERE}: \[10, 10, 20\]'),
        (first(bbox=[10, 10, float('nan'), 5]), 'broken box', 'nan'),
        (first(image_id=77), 'object of no image', 'object 1 in no image, image_id 77'),
        (first(category_id=77), 'object of no category', f'{HERE}, category_id 77'),
        (drop('bbox'), 'object without a key', f"{HERE} lacks 'bbox'"),
        (drop('area'), 'object without a key', f"{HERE} lacks 'area'"),
        (repeat('annotations'), 'duplicate object id', HERE),
        (repeat('images', file_name='00001.png'), 'duplicate image id', '^0: 00001.png$'),
        (repeat('categories'), 'duplicate category id', '^1: disc$'),
        (repeat('images', id=99), 'image listed twice', '00000.png'),
        (repeat('categories', id=9, name='moon'), 'categories', "left out: 'moon'"),
        (lambda c: c['categories'].reverse(), 'classes', 'in another order'),
        (without('image_id', 2), 'image without objects', '00002.png'),
        (without('category_id', 2), 'class without objects', 'ring'),
        (lambda c: c.update(annotations=[]), 'classes', 'nothing to learn'),
        (lambda c: c['images'][0].update(width=64), 'image of another size', '64x128 .* 128x128'),
        (lambda c: c['images'][0].update(file_name='no.png'), 'missing image', 'train/no.png'),
        (lambda c: c.pop('images'), 'data set', 'lists no images'),
        (drop('width', 'images'), 'data set', "lacks 'width'"),
    ],
)
def test_annotations(config, root, change, kind, place):
    edit(root, change)
    found, _ = run(config)
    if kind is None:
        assert found == {}
    else:
        assert any(re.search(place, p) for p in found['train', kind]), found


@pytest.mark.parametrize(
    ('change', 'kind'),
    [
        (drop('segmentation'), 'object without a mask'),
        (first(segmentation=[]), 'object without a mask'),
        (first(segmentation=[[1, 1, 9, 9]]), 'broken mask'),
        (first(segmentation=[[1, 1, 9, 9, 5]]), 'broken mask'),
        (first(segmentation=[[1, 1, 9, 9], [1, 1, 9, 9, 5, 3]]), None),
        (first(segmentation=dict(size=[128, 128])), 'broken mask'),
        (first(segmentation=dict(size=[128, 128], counts=[16384])), None),
    ],
)
def test_masks_where_the_config_loads_them(config, root, change, kind):
    for split in ('train', 'val'):
        edit(root, change, split)
    assert run(config)[0] == {}
    config.train_dataloader.dataset.pipeline[1].with_mask = True
    config.val_evaluator.metric = ['bbox', 'segm']
    found, _ = run(config)
    assert list(found) == [(data, kind) for data in ('train', 'val, test') if kind]
    assert all(re.match('object 1 in .*/00000', place) for (place,) in found.values())
    if kind == 'object without a mask':  # which is what happens in training
        with pytest.raises(KeyError, match='mask'):
            DATASETS.build(config.train_dataloader.dataset).prepare_data(0)


def test_a_file_for_the_evaluation_needs_iscrowd(config, root):
    for split in ('train', 'val'):
        edit(root, drop('iscrowd'), split)
    found, _ = run(config)
    (place,) = found.pop(('val, test', 'object without a key'))
    assert found == {} and re.fullmatch(r"object 1 in .*val/00000\.png lacks 'iscrowd'", place)


@pytest.mark.parametrize('text', [None, '', '{"images": '])
def test_annotation_file_that_cannot_be_read(config, root, text):
    path = root / 'annotations/instances_train.json'
    path.unlink() if text is None else path.write_text(text)
    found, (val,) = run(config)
    (place,) = found['train', 'data set']
    assert ('does not exist' if text is None else 'is empty or not JSON') in place
    assert val.name == 'val, test'  # the rest is read all the same


def test_images(config, root):
    for name, change in (('0', lambda b: b[: len(b) // 2]), ('1', lambda b: b'no image')):
        path = root / f'train/0000{name}.png'
        path.write_bytes(change(path.read_bytes()))
    (root / 'val/00001.png').unlink()
    jpeg = root / 'train/00002.jpg'
    Image.open(root / 'train/00002.png').save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-50])
    edit(root, lambda content: content['images'][2].update(file_name='00002.jpg'))
    found, _ = run(config)
    assert found == {
        ('train', 'truncated image'): [str(root / 'train/00000.png'), str(jpeg)],
        ('train', 'unreadable image'): [str(root / 'train/00001.png')],
        ('val, test', 'missing image'): [str(root / 'val/00001.png')],
    }


@pytest.mark.parametrize(
    ('orientation', 'height', 'listed', 'kind'),
    [
        *((number, 96, (128, 96), 'turned') for number in range(2, 9)),
        (6, 128, (128, 128), 'turned'),
        (1, 96, (128, 96), None),
        (6, 96, (96, 128), None),  # boxes that were made for the turned image
        (3, 96, (96, 128), 'turned'),
    ],
)
def test_image_turned_by_its_exif_data(config, root, orientation, height, listed, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = root / 'train/00000.jpg'
    Image.open(root / 'train/00000.png').resize((128, height)).save(path, exif=exif)
    entries = dict(file_name=path.name, width=listed[0], height=listed[1])
    edit(root, lambda c: c['images'][0].update(entries))
    edit(root, without('image_id', 0))  # whose boxes were drawn for another size
    found, _ = run(config)
    places = found.pop(('train', 'image turned by EXIF'), None)
    assert (places is not None) == (kind is not None), found
    if places:
        assert f'00000.jpg: orientation {orientation}, {listed[0]}x{listed[1]} in' in places[0]
        config.train_dataloader.dataset.pipeline[0].color_type = 'color_ignore_orientation'
        assert ('train', 'image turned by EXIF') not in run(config)[0]


def test_as_many_objects_as_queries(config):
    _, (train, _) = run(config)
    most = train.as_json()['most_objects']
    config.model.num_queries = most
    assert run(config)[0] == {}
    config.model.num_queries -= 1
    (place, *_) = run(config)[0]['train', 'more objects than queries']
    assert f'({most} objects, {most - 1} queries)' in place


def test_wrappers_are_opened(config):
    dataset = config.train_dataloader.dataset
    other = config.val_dataloader.dataset
    both = dict(type='ConcatDataset', datasets=[dataset, dict(dataset), other])
    config.train_dataloader.dataset = dict(
        type='RepeatDataset', times=3, dataset=dict(type='ClassBalancedDataset', dataset=both)
    )
    _, summaries = run(config)
    assert [s.name for s in summaries] == ['train', 'train, val, test']


def test_same_images_in_two_splits(config):
    config.val_dataloader.dataset.data_prefix.img = 'train/'
    assert len(run(config)[0]['train and val', 'image in two splits']) == 2


def test_splits_that_number_the_labels_differently(config, root):
    for split in ('val', 'test'):
        config[f'{split}_dataloader'].dataset.metainfo.classes = CLASSES[::-1]
    edit(root, lambda content: content['categories'].reverse(), 'val')
    found, _ = run(config)
    (place,) = found['train and val, test', 'classes']
    assert "label 0 is 'disc' in train and 'cross' in val" in place


@pytest.mark.parametrize(
    ('file', 'text'),
    [('instances_none.json', 'does not exist'), ('instances_train.json', 'is not the one of')],
)
def test_evaluator_that_reads_another_file(config, root, file, text):
    edit(root, lambda content: content.update(images=content['images'][:1]))
    config.val_evaluator.ann_file = str(root / 'annotations' / file)
    assert text in run(config)[0]['val, test', 'evaluator'][0]


@pytest.mark.parametrize('kind', ['VOCDataset', 'ODVGDataset', 'CocoPanopticDataset'])
def test_data_set_in_another_format(config, kind):
    config.train_dataloader.dataset = dict(type=kind, data_root='nowhere', ann_file='train.txt')
    found, _ = run(config)
    assert found == {('train', 'not checked'): [kind]}


def test_config_without_data(config):
    for split in ('train', 'val', 'test'):
        config[f'{split}_dataloader'] = None
    with pytest.raises(ValueError, match='names no data set'):
        run(config)


def fits(config, build=build_detector):
    """What does not fit a model built from the config with its data."""
    found = Findings()
    check_model(build(config), config, check_data(config, Findings(), workers=1), found)
    return [place for places in found.values() for place in places]


def test_model_that_fits(config):
    assert fits(config) == []


def test_model_that_does_not_fit(config, root):
    config.model.bbox_head.num_classes = 7
    config.load_from = str(root / 'none.pth')
    config.model.neck.num_outs = 3
    classes, also, start, levels = fits(config)
    assert 'bbox_head.num_classes is 7, but metainfo.classes of train has 4' in classes
    assert 'of val, test has 4' in also
    assert 'num_feature_levels is 4, but the neck gives 3 maps' in levels
    assert 'none.pth does not exist' in start


def test_stock_model_that_is_asked_for_too_much(config):
    config.model.type = 'DINO'
    config.model.encoder.pop('schedule')
    config.model.decoder.pop('key_aware')
    config.model.test_cfg.max_per_img = 300
    (place,) = fits(config)
    assert 'max_per_img=300' in place


@pytest.mark.parametrize(('width', 'thin'), [(6, False), (5, True)])
def test_image_with_fewer_tokens_than_queries(config, root, width, thin):
    """Resized from 80 pixels to 128, 6 become 10: 16 x 2, 8, 4 and 2 tokens are 46. 5 become 8."""
    Image.open(root / 'val/00000.png').resize((width, 80)).save(root / 'val/00000.png')
    edit(root, lambda c: c['images'][0].update(width=width, height=80), 'val')
    config.model.num_queries = config.model.test_cfg.max_per_img = 46
    places = fits(config)
    assert len(places) == thin
    if thin:
        assert re.search(r'val/00000\.png \(30 tokens, 46 queries\)', places[0])


@pytest.mark.parametrize(('num_classes', 'wrong'), [(256, 0), (4, 1)])
def test_detector_that_reads_text(config, num_classes, wrong, monkeypatch):
    """Its classes are tokens, of which it has 256, whatever the data's classes."""
    monkeypatch.setattr(families, 'reads_text', lambda model: True)

    def build(config):
        model = build_detector(config)
        model.bbox_head.num_classes, model.bbox_head.max_text_len = num_classes, 256
        return model

    places = fits(config, build)
    assert len(places) == wrong and all('set it to 256' in place for place in places)
