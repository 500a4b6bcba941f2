import json
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from PIL import Image

from mmlite.datasets import CLASSES, check, generate_shapes
from mmlite.openmmlab.build import build_detector

CONFIG = Path(__file__).parents[2] / (
    'configs/small/lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'
)


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


def run(config, build=None):
    """Everything found, as ``{(data, kind): places}``, and the data sets.

    With ``build`` it is what does not fit between the data and the model that it builds.
    """
    found = defaultdict(list)
    data_sets = check.check_data(config, found, 2, lambda text, total: lambda: None)
    if build:
        found.clear()
        check.check_model(build(config), config, data_sets, found)
    return {finding: places for finding, places in found.items() if places}, data_sets


def fits(config, build=build_detector):
    return [place for places in run(config, build)[0].values() for place in places]


def test_nothing_to_find(config, root):
    found, (train, val) = run(config)
    assert found == {}
    assert (train.name, val.name) == ('train', 'val, test')
    report = train.as_json()
    assert (report['images'], val.as_json()['images']) == (4, 2)
    assert [count['name'] for count in train.classes] == list(CLASSES)
    objects = json.loads((root / 'annotations/instances_train.json').read_text())['annotations']
    areas = [entry['area'] for entry in objects]
    total = {size: sum(count[size] for count in train.classes) for size in check.COUNTS[2:]}
    assert report['objects'] == total['objects'] == len(areas)
    assert total['small'] == sum(area < 32**2 for area in areas)
    assert total['large'] == sum(area >= 96**2 for area in areas)
    assert report['most_objects'] == max(Counter(o['image_id'] for o in objects).values())
    discs = {o['image_id'] for o in objects if o['category_id'] == 1}
    assert train.classes[0]['images'] == len(discs)


def first(part='annotations', **entries):
    return lambda content: content[part][0].update(entries)


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
        (first(bbox=None), 'broken box', 'None'),
        (first(area=None), 'broken box', 'area None'),
        (first(area='12'), 'broken box', 'area 12'),
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
        (lambda c: c.update(annotations=[]), 'classes', 'holds no objects of the classes'),
        (first('images', width=64), 'image of another size', '64x128 .* 128x128'),
        (first('images', file_name='no.png'), 'missing image', 'train/no.png'),
        (lambda c: c.pop('images'), 'data set', 'lists no images'),
        (drop('width', 'images'), 'data set', "lacks 'width'"),
    ],
)
def test_annotations(config, root, change, kind, place):
    edit(root, change)
    found, data_sets = run(config)
    assert data_sets[-1].name == 'val, test'  # is read, whatever is wrong with the other
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
        (first(segmentation=[[1, 1, 9, 9, 5, 3, 2]]), 'broken mask'),
        (first(segmentation=[[1, 1, 9, 9], [1, 1, 9, 9, 5, 3]]), None),
        (first(segmentation=[[1, 1, 9, 9, float('nan'), 3]]), 'broken mask'),
        (first(segmentation=[1, 1, 9, 9, 5, 3]), 'broken mask'),
        (first(segmentation='polygon'), 'broken mask'),
        (first(segmentation=dict(size=[128, 128])), 'broken mask'),
        (first(segmentation=dict(size=[64, 128], counts=[8192])), 'broken mask'),
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
    config.val_dataloader.dataset = config.train_dataloader.dataset
    assert ('train, val', 'object without a key') in run(config)[0]


def test_images_are_turned_as_the_pipeline_does(config, root):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = root / 'train/00000.jpg'
    Image.open(root / 'train/00000.png').save(path, exif=exif)
    edit(root, first('images', file_name=path.name))
    (place,) = run(config)[0]['train', 'image turned by EXIF']
    assert '00000.jpg: orientation 3, 128x128 in' in place
    load = config.train_dataloader.dataset.pipeline[0]
    for color, backend in (('color_ignore_orientation', 'cv2'), ('unchanged', 'pillow')):
        load.update(color_type=color, imdecode_backend=backend)
        assert run(config)[0] == {}
    load.update(color_type='color', imdecode_backend='turbojpeg')
    assert run(config)[0] == {}


def test_as_many_objects_as_queries(config):
    config.model.num_queries = most = run(config)[1][0].as_json()['most_objects']
    assert run(config)[0] == {}
    config.model.num_queries -= 1
    (place, *_) = run(config)[0]['train', 'more objects than queries']
    assert f'({most} objects, {most - 1} queries)' in place


def test_crowds_are_not_counted(config, root):
    before = run(config)[1][0].as_json()['objects']
    edit(root, first(iscrowd=1))
    assert run(config)[1][0].as_json()['objects'] == before - 1


def test_wrappers_are_opened(config):
    dataset, other = config.train_dataloader.dataset, config.val_dataloader.dataset
    both = dict(type='ConcatDataset', datasets=[dataset, dict(dataset), other])
    config.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=both)
    assert [data.name for data in run(config)[1]] == ['train', 'train, val, test']


def test_same_images_in_two_splits(config):
    config.val_dataloader.dataset.data_prefix.img = 'train/'
    assert len(run(config)[0]['train and val', 'image in two splits']) == 2


def test_splits_that_number_the_labels_differently(config, root):
    for split in ('val', 'test'):
        config[f'{split}_dataloader'].dataset.metainfo.classes = CLASSES[::-1]
    edit(root, lambda content: content['categories'].reverse(), 'val')
    (place,) = run(config)[0]['train and val, test', 'classes']
    assert re.search("'disc', .* in train and 'cross', .* in val, test: list the", place)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (None, 'does not exist'),
        (lambda content: None, ''),  # a copy will do, and so will one of more images
        (lambda content: content['images'].append({**content['images'][0], 'id': 99}), ''),
        (lambda content: content['categories'].reverse(), 'is not the one of'),
        (lambda content: content['images'].pop(), 'is not the one of'),
    ],
)
def test_evaluator_that_reads_another_file(config, root, change, text):
    path = root / 'annotations/instances_other.json'
    if change:
        shutil.copy(root / 'annotations/instances_val.json', path)
        edit(root, change, 'other')
    config.test_evaluator.ann_file = str(path)
    places = run(config)[0].get(('val, test', 'evaluator'), [])
    assert len(places) == bool(text) and all(text in place for place in places)


def test_data_set_in_another_format_and_none(config):
    for kind in ('VOCDataset', 'ODVGDataset', 'CocoPanopticDataset'):
        config.train_dataloader.dataset = dict(type=kind, data_root='nowhere', ann_file='a.txt')
        assert run(config)[0] == {('train', 'not checked'): [kind]}
    for split in ('train', 'val', 'test'):
        config[f'{split}_dataloader'] = None
    with pytest.raises(ValueError, match='names no data set'):
        run(config)


STOCK = {'model.type': 'DINO', 'model.test_cfg.max_per_img': 300}


@pytest.mark.parametrize(
    ('changes', 'texts'),
    [
        ({}, []),
        (
            {'model.bbox_head.num_classes': 7},
            ['num_classes is 7, but metainfo.classes of train has 4', 'of val, test has 4'],
        ),
        ({'model.neck.num_outs': 3}, ['num_feature_levels is 4, but the neck gives 3 maps']),
        ({'model.neck.in_channels': [1, 2, 3]}, ['the backbone and the neck do not run']),
        ({'load_from': 'none.pth'}, ['load_from=none.pth does not exist']),
        ({'load_from': 'https://host/file.pth'}, []),
        (STOCK, ['max_per_img=300 is more than']),
        ({**STOCK, 'model.num_queries': 75}, []),  # of 4 classes, which is just enough
    ],
)
def test_model(config, changes, texts):
    config.merge_from_dict(changes)
    if 'model.type' in changes:
        del config.model.encoder.schedule, config.model.decoder.key_aware
    places = fits(config)
    assert len(places) == len(texts)
    assert all(text in place for text, place in zip(texts, places))


@pytest.mark.parametrize(('num_classes', 'wrong'), [(256, 0), (4, 1)])
def test_detector_that_reads_text(config, num_classes, wrong, monkeypatch):
    """Its classes are tokens, of which it has 256, whatever the data's classes."""
    monkeypatch.setattr(check, 'reads_text', lambda model: True)

    def build(config):
        model = build_detector(config)
        model.bbox_head.num_classes, model.bbox_head.max_text_len = num_classes, 256
        return model

    places = fits(config, build)
    assert len(places) == wrong and all('set it to 256' in place for place in places)
