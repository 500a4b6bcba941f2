from __future__ import annotations

import json
import subprocess
import sys

import pytest
from mmdet.registry import DATASETS

from mmlite.datasets import CLASSES, CheckedCocoDataset, generate_shapes

FILE = 'annotations/instances_train.json'


@pytest.fixture
def root(tmp_path):
    generate_shapes(tmp_path, {'train': 3}, image_size=128)
    return tmp_path


def build(root, classes=CLASSES, **options):
    return DATASETS.build(
        {
            'type': 'CheckedCocoDataset',
            'data_root': str(root),
            'ann_file': FILE,
            'data_prefix': {'img': 'train/'},
            'metainfo': {'classes': classes},
            'pipeline': [],
            **options,
        }
    )


def change(root, **parts):
    path = root / FILE
    content = json.loads(path.read_text())
    content.update(parts)
    path.write_text(json.dumps(content))


def test_builds(root):
    dataset = build(root)
    assert type(dataset) is CheckedCocoDataset
    assert len(dataset) == 3
    assert len(dataset.get_data_info(0)['instances']) > 0


def test_missing_annotation_file(root):
    with pytest.raises(FileNotFoundError, match=r'annotation file .*other\.json does not exist'):
        build(root, ann_file='other.json')


@pytest.mark.parametrize('text', ['', 'images', '[]', '{"images": '])
def test_file_that_is_empty_or_not_json(root, text):
    (root / FILE).write_text(text)
    with pytest.raises(ValueError, match='is empty or not JSON'):
        build(root)


@pytest.mark.parametrize('part', ['images', 'categories'])
def test_file_that_lists_nothing(root, part):
    change(root, **{part: []})
    with pytest.raises(ValueError, match=f'lists no {part}'):
        build(root)


def test_file_without_objects_is_for_testing_only(root):
    change(root, annotations=[])
    with pytest.raises(ValueError, match='holds no objects'):
        build(root)
    assert len(build(root, test_mode=True)) == 3


def test_file_in_another_format(root):
    with pytest.raises(ValueError, match=r"not in COCO's format: an entry lacks 'file_name'"):
        change(root, images=[{'id': 0, 'name': 'a.png'}])
        build(root)
    with pytest.raises(ValueError, match=r"not in COCO's format: an entry lacks 'image_id'"):
        change(root, annotations=[{'bbox': [1, 2, 3, 4]}])
        build(root)


def test_image_folder_that_is_not_there(root):
    with pytest.raises(FileNotFoundError, match=r'images/00000\.png, listed in .* does not exist'):
        build(root, data_prefix={'img': 'images/'})


def test_categories_that_the_config_leaves_out(root):
    with pytest.warns(UserWarning, match=r"left out: 'cross'; add them to metainfo\.classes"):
        dataset = build(root, classes=CLASSES[:-1])
    assert len(dataset) == 3
    dataset = build(root, classes=CLASSES[:-1], ignored_categories=['cross'])
    assert dataset.metainfo['classes'] == CLASSES[:-1]


def test_class_that_the_file_lacks(root):
    with pytest.warns(UserWarning, match=r"lacks classes of the config: 'moon'; nothing will be"):
        build(root, classes=(*CLASSES, 'moon'))
    with pytest.raises(ValueError, match=r"lacks classes of the config: 'moon'; a prediction"):
        build(root, classes=(*CLASSES, 'moon'), test_mode=True)


@pytest.mark.parametrize('classes', [CLASSES[::-1], ('moon', *CLASSES)])
def test_labels_that_get_wrong_names(root, classes):
    with pytest.warns(
        UserWarning, match=r"another order .* set metainfo\.classes to 'disc', 'ring'"
    ):
        build(root, classes=classes)


@pytest.mark.parametrize('test_mode', [True, False])
def test_none_of_the_classes(root, test_mode):
    with pytest.raises(
        ValueError, match=r"none of the classes .*'cat', 'dog'; set .* 'disc', 'ring'"
    ):
        build(root, classes=('cat', 'dog'), test_mode=test_mode)


def test_category_listed_twice(root):
    change(root, categories=[{'id': i, 'name': 'disc'} for i in (1, 2)])
    with pytest.raises(ValueError, match="lists categories twice: 'disc'"):
        build(root, classes=('disc',))


def test_objects_of_other_classes_alone(root):
    content = json.loads((root / FILE).read_text())
    change(root, annotations=[a for a in content['annotations'] if a['category_id'] != 1])
    with pytest.raises(ValueError, match='holds no objects of the classes'):
        build(root, classes=CLASSES[:1], ignored_categories=CLASSES[1:])


@pytest.mark.parametrize('classes', [CLASSES, CLASSES[1:3]])
@pytest.mark.filterwarnings('ignore:annotation file')
def test_gives_what_the_stock_data_set_gives(root, classes):
    checked, stock = (
        build(root, classes, type=name) for name in ('CheckedCocoDataset', 'CocoDataset')
    )
    assert [checked.get_data_info(i) for i in range(3)] == [
        stock.get_data_info(i) for i in range(3)
    ]


def test_registered_on_import_of_mmlite_alone():
    """As in a process of mim train, where custom_imports names mmlite and nothing else."""
    code = (
        'import mmlite\n'
        'from mmdet.registry import DATASETS\n'
        "for name in ('CheckedCocoDataset', 'CocoDataset'):\n"
        '    print(DATASETS.get(name).__module__)\n'
    )
    output = subprocess.check_output([sys.executable, '-c', code], text=True)
    # the last words, as the continuation prints remarks of its own
    assert output.split()[-2:] == ['mmlite.datasets.coco', 'mmdet.datasets.coco']
