"""The hooks in a real run of mmengine: one short epoch and its validation."""

from __future__ import annotations

import json

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmlite.datasets import CLASSES, generate_shapes

CONFIG = """
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(
    type='LiteDeformableDETR',
    num_queries=20,
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[128, 256, 512]),
    encoder=dict(num_layers=2, schedule='H3L1-(2+1)x1'),
    decoder=dict(num_layers=1),
    bbox_head=dict(num_classes=4),
    test_cfg=dict(max_per_img=10),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                          'scale_factor')),
]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root='{root}/', ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'), metainfo=dict(classes={classes}), pipeline=pipeline))
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False,
    dataset=dict(data_root='{root}/', ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'), metainfo=dict(classes={classes}), pipeline=pipeline))
val_evaluator = dict(ann_file='{root}/annotations/instances_val.json')
train_cfg = dict(max_epochs=1)
visualizer = dict(vis_backends={backends})
work_dir = '{root}/work'
log_level = 'ERROR'
custom_hooks = [
    dict(type='EfficiencyHook', image_size=(128, 160)),
    dict(type='AttentionMapHook', num_images=2),
]
"""


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp('hooks')
    generate_shapes(root, {'val': 2}, image_size=128)
    backends = [{'type': 'LocalVisBackend'}]
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        pass
    else:
        backends.append({'type': 'TensorboardVisBackend'})
    config = root / 'config.py'
    config.write_text(CONFIG.format(root=root, classes=CLASSES, backends=backends))
    Runner.from_cfg(Config.fromfile(config)).train()
    return root / 'work'


def test_costs(work_dir):
    cost = json.loads((work_dir / 'efficiency.json').read_text())
    assert cost['image_size'] == [128, 160]
    assert cost['flops'] == sum(cost['stage_flops'].values())
    scalars = [
        json.loads(line)
        for path in work_dir.glob('*/vis_data/scalars.json')
        for line in path.read_text().splitlines()
    ]
    logged = next(line for line in scalars if 'efficiency/gflops' in line)
    assert logged['efficiency/gflops'] == pytest.approx(cost['flops'] / 1e9)
    assert logged['efficiency/gflops_encoder'] > 0


def test_pictures(work_dir):
    drawn = {path.name for path in work_dir.rglob('vis_image/*.png')}
    assert {'attention_0_1.png', 'attention_1_1.png', 'attention_levels_1.png'} <= drawn


def test_tensorboard(work_dir):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    found = next(work_dir.rglob('events.out.tfevents*'))
    log = events.EventAccumulator(str(found.parent))
    log.Reload()
    assert 'efficiency/gflops' in log.Tags()['scalars']
    assert {'attention_0', 'attention_levels'} <= set(log.Tags()['images'])
