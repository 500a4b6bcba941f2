import cv2
import numpy as np
import pytest
from mmdet.datasets.transforms import Resize
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import Compose

from mmlite.export import Detector
from mmlite.export.detector import resized_size
from mmlite.export.pipeline import class_names, prepare, preprocessing

register_all_modules()
ENDS = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]
FLOAT = dict(type='LoadImageFromFile', to_float32=True)  # as Mask2Former's
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
        [dict(type='mmcv.transforms.Resize', scale=(240, 150), keep_ratio=True)],
        [FLOOR],
        [FLOOR, dict(type='Pad', size_divisor=32, pad_val=dict(img=114))],
        [dict(type='mmdet.Resize', scale=(90, 90)), dict(type='Pad', size=(200, 100))],
        [FLOAT, dict(type='Resize', scale=(240, 150)), dict(type='Pad', size_divisor=32)],
    ],
)
def test_images_are_prepared_as_by_mmdetection(steps, shape, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    file = str(tmp_path / 'image.png')
    cv2.imwrite(file, image)
    whole = Compose(config(*steps).test_dataloader.dataset.pipeline)
    pixels = whole({'img_path': file, 'img_id': 0})['inputs'].numpy()
    for cfg in (config(*steps), wrapped(config(*steps), 'ConcatDataset', 'RepeatDataset')):
        detector = Detector(None, {'classes': [], 'preprocessing': preprocessing(cfg)})
        expected, factors = prepare(cfg, image)
        height, width = detector.resized_size(image)
        assert factors == (width / shape[1], height / shape[0])
        np.testing.assert_array_equal(detector.preprocess(image), expected)
        np.testing.assert_array_equal(expected, pixels)


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
        ([dict(type='LoadMultiChannelImageFromFiles')], 'has LoadMultiChannelImageFromFiles as'),
        ([dict(type='PackAndSharpen')], 'has PackAndSharpen as'),
    ],
)
def test_other_transforms_are_refused_by_name(steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        preprocessing(wrapped(config(*steps), 'ConcatDataset'))


def test_the_decoder_of_the_config():
    steps = [dict(type='LoadImageFromFile', imdecode_backend='pillow'), ENDS[1]]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    assert preprocessing(cfg)['decoder'] == 'pillow' and preprocessing(config())['decoder'] == 'cv2'


def test_what_does_not_touch_pixels_is_left_out():
    steps = [ENDS[0], dict(type='LoadAnnotations'), FLOOR, dict(type='PackDetInputs', meta_keys=())]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    assert preprocessing(cfg) == preprocessing(config(FLOOR))
    content, (across, down) = prepare(cfg, np.zeros((97, 211, 3), np.uint8))
    assert content.shape == (3, 111, 243) and (across, down) == (243 / 211, 111 / 97)


@pytest.mark.parametrize('loader', [None, {}, dict(dataset=dict(type='CocoDataset'))])
def test_a_config_may_have_no_test(loader):
    cfg, image = Config(dict(test_dataloader=loader)), np.zeros((5, 7, 3), np.uint8)
    assert preprocessing(cfg) == preprocessing(None)
    assert prepare(cfg, image)[0].shape == (3, 5, 7) and class_names(cfg, count=1) == ['0']


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
