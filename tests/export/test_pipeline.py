import numpy as np
import pytest
from mmdet.datasets.transforms import Resize
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmlite.export import Detector
from mmlite.export.detector import resized_size
from mmlite.export.pipeline import class_names, prepare, preprocessing

register_all_modules()
ENDS = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]
FLOOR = dict(type='FixScaleResize', scale=(243, 150), keep_ratio=True, backend='pillow')


def config(*steps: dict, **dataset) -> Config:
    dataset = dict(type='CocoDataset', pipeline=[ENDS[0], *steps, ENDS[1]], **dataset)
    return Config(dict(test_dataloader=dict(dataset=dataset)))


@pytest.mark.parametrize('shape', [(97, 211), (211, 97), (89, 125), (64, 9), (151, 240)])
@pytest.mark.parametrize(
    'steps',
    [
        [],
        [dict(type='Resize', scale=(240, 150), keep_ratio=True)],
        [dict(type=Resize, scale=(240, 150))],
        [dict(type='mmdet.datasets.transforms.Resize', scale=100)],
        [FLOOR],
        [FLOOR, dict(type='Pad', size_divisor=32, pad_val=dict(img=114))],
        [dict(type='mmdet.Resize', scale=(90, 90)), dict(type='Pad', size=(200, 100))],
    ],
)
def test_images_are_prepared_as_by_mmdetection(steps, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for cfg in (config(*steps), wrapped(config(*steps), 'ConcatDataset', 'RepeatDataset')):
        detector = Detector(None, {'classes': [], 'preprocessing': preprocessing(cfg)})
        expected, factors = prepare(cfg, image)
        height, width = detector.resized_size(image)
        assert factors == (width / shape[1], height / shape[0])
        np.testing.assert_array_equal(detector.preprocess(image), expected)


def test_a_line_keeps_a_row():
    """Where MMCV rounds to none."""
    assert resized_size((1, 4000), {'scale': [1333, 800], 'keep_ratio': True}) == (1, 1333)


def wrapped(cfg: Config, *kinds: str) -> Config:
    dataset = cfg.test_dataloader.dataset
    for kind in kinds:
        inner = dict(datasets=[dataset] * 2) if 'Concat' in kind else dict(dataset=dataset)
        dataset = dict(type=kind, **inner)
    return Config(dict(test_dataloader=dict(dataset=dataset)))


@pytest.mark.parametrize(
    'steps, sentence',
    [
        ([dict(type='RandomFlip', prob=0.5)], 'has RandomFlip as'),
        ([dict(type='TransformOfMine')], 'has TransformOfMine as'),
        ([dict(type='Resize', scale_factor=2.0)], 'has Resize as'),
        ([dict(type='Resize', scale=9, interpolation='area')], 'has Resize as'),
        ([dict(type='Pad', pad_to_square=True)], 'has Pad as'),
        ([dict(type='Pad', size_divisor=32, padding_mode='edge')], 'has Pad as'),
        ([dict(type='Pad', size_divisor=32), FLOOR], 'has FixScaleResize as'),
        ([dict(type='Pad', size_divisor=32)] * 2, 'has Pad as'),
        ([dict(type='LoadImageFromFile', color_type='grayscale')], "color_type 'grayscale'"),
        ([dict(type='LoadImageFromFile', imdecode_backend='tifffile')], 'images by tifffile'),
    ],
)
def test_other_transforms_are_refused_by_name(steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        preprocessing(wrapped(config(*steps), 'ConcatDataset'))


def test_the_decoder_of_the_config():
    steps = [dict(type='LoadImageFromFile', imdecode_backend='pillow'), ENDS[1]]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    assert preprocessing(cfg)['decoder'] == 'pillow' and preprocessing(config())['decoder'] == 'cv2'


def test_data_sets_that_differ_are_refused():
    cfg = wrapped(config(FLOOR), 'ConcatDataset')
    cfg.test_dataloader.dataset.datasets[1] = config().test_dataloader.dataset
    with pytest.raises(ValueError, match='have different pipelines'):
        preprocessing(cfg)


def test_class_names():
    assert class_names(None, count=2) == ['0', '1'] and class_names(None) == []
    cfg = wrapped(config(metainfo=dict(classes=('a', 'b'))), 'ConcatDataset')
    assert class_names(cfg) == ['a', 'b']
    assert class_names(cfg, count=80)[:2] == ['person', 'bicycle']
