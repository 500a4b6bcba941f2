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
            'type': 'CocoDataset',
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


def test_the_stock_name_gives_the_checked_data_set(root):
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
    change(root, annotations=[{'bbox': [1, 2, 3, 4]}])
    with pytest.raises(ValueError, match=r"not in COCO's format: an entry lacks 'image_id'"):
        build(root)


def test_image_folder_that_is_not_there(root):
    with pytest.raises(FileNotFoundError, match=r'images/00000\.png, listed in .* does not exist'):
        build(root, data_prefix={'img': 'images/'})


def test_category_that_the_config_does_not_know(root):
    with pytest.raises(ValueError, match=r"does not know: 'cross'; add them to metainfo\.classes"):
        build(root, classes=CLASSES[:-1])
    dataset = build(root, classes=CLASSES[:-1], ignored_categories=['cross'])
    assert dataset.metainfo['classes'] == CLASSES[:-1]


def test_class_that_the_file_lacks(root):
    with pytest.raises(ValueError, match=r"lacks classes of the config: 'moon'"):
        build(root, classes=(*CLASSES, 'moon'))


def test_classes_in_another_order(root):
    with pytest.raises(ValueError, match=r"another order .* set metainfo\.classes to 'disc'"):
        build(root, classes=CLASSES[::-1])


def test_registered_on_import_of_mmlite_alone(root):
    """As in a process of mim train, where custom_imports names mmlite and nothing else."""
    code = (
        'import mmlite\n'
        'from mmdet.registry import DATASETS\n'
        "print(DATASETS.get('CocoDataset').__name__)\n"
    )
    output = subprocess.check_output([sys.executable, '-c', code], text=True)
    # the last word, as the continuation prints remarks of its own
    assert output.split()[-1] == 'CheckedCocoDataset'
