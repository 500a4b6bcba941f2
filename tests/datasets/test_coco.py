import json

import pytest
from mmdet.registry import DATASETS

from mmlite.datasets import CLASSES, generate_shapes
from mmlite.datasets.coco import listed

FILE = 'annotations/instances_train.json'


@pytest.fixture
def root(tmp_path):
    generate_shapes(tmp_path, {'train': 3})
    return tmp_path


def build(root, classes=CLASSES, **options):
    stock = dict(type='CheckedCocoDataset', data_root=str(root), ann_file=FILE, pipeline=[])
    stock.update(data_prefix=dict(img='train/'), metainfo=dict(classes=classes))
    return DATASETS.build({**stock, **options})


def change(root, **parts):
    content = json.loads((root / FILE).read_text())
    (root / FILE).write_text(json.dumps({**content, **parts}))


CROWD = dict(id=1, image_id=0, category_id=1, bbox=[1, 2, 3, 4], area=12, iscrowd=1)


@pytest.mark.parametrize(
    ('parts', 'options', 'message'),
    [
        *((text, {}, 'is empty or not JSON') for text in ('', 'images', '[]', '{"images": ')),
        ({'images': []}, {}, 'lists no images'),
        ({'categories': []}, {}, 'lists no categories'),
        ({'annotations': []}, {}, 'holds no objects of the classes'),
        ({'annotations': [CROWD]}, {}, 'holds no objects of the classes'),
        ({'annotations': [{**CROWD, 'category_id': 9, 'iscrowd': 0}]}, {}, 'holds no objects of'),
        ({'images': [{'id': 0, 'name': 'a'}]}, {}, "COCO's format: an entry lacks 'file_name'"),
        ({'annotations': [{'bbox': [1, 2, 3, 4]}]}, {}, "an entry lacks 'image_id'"),
        (
            {'categories': [{'id': i, 'name': 'disc'} for i in (1, 2)]},
            {'classes': ('disc',)},
            "lists categories twice: 'disc'",
        ),
        ({}, {'ann_file': 'other.json'}, r'annotation file .*other\.json does not exist'),
        ({}, {'data_prefix': {'img': 'no/'}}, r'no/00000\.png, listed in .* does not exist'),
        ({}, {'classes': ('cat', 'dog')}, "'cat', 'dog'; set .* 'disc'"),
        ({}, {'classes': ('cat', 'dog'), 'test_mode': True}, "'cat', 'dog'; .* 'disc'"),
        (
            {},
            {'classes': (*CLASSES, 'moon'), 'test_mode': True},
            "lacks classes of the config: 'moon'; a prediction .* set metainfo.classes to 'disc'",
        ),
    ],
)
@pytest.mark.filterwarnings('ignore:annotation file')
def test_refuses(root, parts, options, message):
    (root / FILE).write_text(parts) if isinstance(parts, str) else change(root, **parts)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(root, **options)


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (CLASSES[:-1], r"left out: 'cross'; add them to metainfo\.classes"),
        ((*CLASSES, 'moon'), "lacks classes of the config: 'moon'; nothing will be"),
        (CLASSES[::-1], r"another order .* set metainfo\.classes to 'disc', 'ring'"),
        (('moon', *CLASSES), r"another order .* set metainfo\.classes to 'disc', 'ring'"),
    ],
)
def test_warns_and_builds(root, classes, message):
    with pytest.warns(UserWarning, match=message):
        assert len(build(root, classes)) == 3


@pytest.mark.filterwarnings('error:annotation file')
def test_builds_without_a_word(root, capsys):
    dataset = build(root, CLASSES[:-1], ignored_categories=['cross'])
    assert capsys.readouterr().out == ''  # pycocotools is not heard
    assert dataset.metainfo['classes'] == CLASSES[:-1]
    change(root, annotations=[])
    assert len(build(root, test_mode=True)) == 3


@pytest.mark.parametrize('classes', [CLASSES, CLASSES[1:3]])
@pytest.mark.filterwarnings('ignore:annotation file')
def test_gives_what_the_stock_data_set_gives(root, classes):
    checked, stock = (build(root, classes, type=t) for t in ('CheckedCocoDataset', 'CocoDataset'))
    for index in range(3):
        assert checked.get_data_info(index) == stock.get_data_info(index)


def test_listed():
    assert listed('abc', 3) == "'a', 'b', 'c'"
    assert listed('abcde', 3) == "'a', 'b', 'c' and 2 more"
