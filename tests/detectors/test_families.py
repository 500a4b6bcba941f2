"""The families of H-DETR through mim and mmengine: train, test, and keep the schedule."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from mmlite.datasets import CLASSES, generate_shapes

ROOT = Path(__file__).parents[2]
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
    """A folder with a tiny data set and a config of each family."""
    folder = tmp_path_factory.mktemp('families')
    generate_shapes(folder / 'data', {'train': 4, 'val': 2})
    for name, base in BASES.items():
        text = TINY.format(
            base=str(ROOT / 'configs' / base), num_classes=len(CLASSES), classes=tuple(CLASSES)
        )
        if name.startswith('Lite'):
            text = text.replace(
                'num_layers=2, layer', "schedule='H3L1-(2+1)x1', num_layers=2, layer", 1
            )
        (folder / f'{name}.py').write_text(text)
    return folder


def mim(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-c', 'from mim.cli import cli; cli()', *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize('name', BASES)
def test_mim_trains_and_tests(folder, name):
    config = f'{name}.py'
    train = mim('train', 'mmdet', config, '--gpus', '0', '--work-dir', name, cwd=folder)
    assert train.returncode == 0, train.stdout[-3000:]
    assert 'd0.loss_cls_one2many' in train.stdout

    checkpoint = folder / name / 'epoch_1.pth'
    test = mim('test', 'mmdet', config, '--checkpoint', checkpoint, '--gpus', '0', cwd=folder)
    assert test.returncode == 0, test.stdout[-3000:]
    assert 'coco/bbox_mAP' in test.stdout

    if name.startswith('Lite'):
        # As mim test loads it, through mmengine, which takes what fits and warns about the rest.
        model = Config.fromfile(folder / config).model
        load_checkpoint(MODELS.build(copy.deepcopy(model)), str(checkpoint))
        model.encoder.schedule = 'H2L2-(2+1)x1'
        with pytest.raises(ValueError, match=r"set encoder=dict\(schedule='H3L1-\(2\+1\)x1'"):
            load_checkpoint(MODELS.build(model), str(checkpoint), strict=False)
