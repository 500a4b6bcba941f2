"""The families of H-DETR by MMDetection's scripts: train, test, and keep the schedule."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from mmdet.registry import MODELS
from mmdet_tools import run_tools
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from mmlite.datasets import CLASSES, generate_shapes

ROOT = Path(__file__).parents[3]
TINY = """
_base_ = {base!r}
custom_imports = dict(imports=['mmlite'])
ffn_cfg = dict(feedforward_channels=32)
model = dict(
    num_queries=20,
    num_one2many_queries=30,
    backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64]),
    encoder=dict(num_layers=2, layer_cfg=dict(ffn_cfg=ffn_cfg)),
    decoder=dict(num_layers=2, layer_cfg=dict(ffn_cfg=ffn_cfg)),
    bbox_head=dict(num_classes={num_classes}),
    test_cfg=dict(max_per_img=20),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
metainfo = dict(classes={classes!r})
dataset = dict(data_root='data/', metainfo=metainfo, pipeline=pipeline)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'), **dataset
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'), **dataset
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
"""
BASES = {
    'HDeformableDETR': 'h_deformable_detr/h-deformable-detr_r50_8xb2-12e_coco.py',
    'LiteHDeformableDETR': (
        'lite_h_deformable_detr/lite-h-deformable-detr_r50_h3l1-2p1x3_8xb2-36e_coco.py'
    ),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tiny data set and a config of each family, trained for an epoch and tested."""
    folder = tmp_path_factory.mktemp('families')
    generate_shapes(folder / 'data', {'train': 4, 'val': 2})
    runs = []
    for name, base in BASES.items():
        text = TINY.format(
            base=str(ROOT / 'configs' / base), num_classes=len(CLASSES), classes=tuple(CLASSES)
        )
        if name.startswith('Lite'):
            text = text.replace(
                'num_layers=2, layer', "schedule='H3L1-(2+1)x1', num_layers=2, layer", 1
            )
        (folder / f'{name}.py').write_text(text)
        test = (f'{name}.py', f'{name}/epoch_1.pth', '--work-dir', f'{name}_test')
        runs += [('train', f'{name}.py', '--work-dir', name), ('test', *test)]
    run_tools(runs, cwd=folder)
    return folder


@pytest.mark.parametrize('name', BASES)
def test_trains_and_tests(folder, name):
    (log,) = (folder / name).glob('*/*.log')
    assert 'd0.loss_cls_one2many' in log.read_text()
    (metrics,) = (folder / f'{name}_test').glob('*/*.json')
    assert 'coco/bbox_mAP' in json.loads(metrics.read_text())


def test_another_schedule_is_refused(folder):
    """As mim test loads it, through mmengine, which takes what fits and warns about the rest."""
    name = 'LiteHDeformableDETR'
    checkpoint = str(folder / name / 'epoch_1.pth')
    model = Config.fromfile(folder / f'{name}.py').model
    load_checkpoint(MODELS.build(copy.deepcopy(model)), checkpoint)
    model.encoder.schedule = 'H2L2-(2+1)x1'
    with pytest.raises(ValueError, match=r"set encoder=dict\(schedule='H3L1-\(2\+1\)x1'"):
        load_checkpoint(MODELS.build(model), checkpoint, strict=False)
