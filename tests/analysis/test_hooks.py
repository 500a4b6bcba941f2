import json

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from small_detectors import small_config, write_pair

from mmlite.datasets import CLASSES, generate_shapes


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp('hooks')
    generate_shapes(root, {'val': 2}, image_size=128)
    pipeline = small_config('plain').test_dataloader.dataset.pipeline
    pipeline[1].scale = (128, 128)
    dataset = dict(
        **dict(data_root=f'{root}/', data_prefix=dict(img='val/'), pipeline=pipeline),
        **dict(ann_file='annotations/instances_val.json', metainfo=dict(classes=CLASSES)),
    )
    loader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
    _, config = write_pair(
        root,
        'plain',
        **{
            'model.bbox_head.num_classes': 4,
            'model.test_cfg.max_per_img': 10,
            'train_dataloader': loader,
            'val_dataloader': {**loader, 'batch_size': 1},
            'val_evaluator.ann_file': f'{root}/annotations/instances_val.json',
            'train_cfg.max_epochs': 1,
            'work_dir': f'{root}/work',
            'log_level': 'ERROR',
            'custom_imports': dict(imports=['mmlite']),
            'custom_hooks': [
                dict(type='EfficiencyHook', image_size=(128, 160)),
                dict(type='AttentionMapHook', num_images=2),
            ],
        },
    )
    Runner.from_cfg(Config.fromfile(config)).train()
    return root / 'work'


def test_costs(work_dir):
    cost = json.loads((work_dir / 'efficiency.json').read_text())
    assert cost['image_size'] == [128, 160]
    assert cost['flops'] == sum(cost['stage_flops'].values())
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    logged = next(line for line in map(json.loads, lines) if 'efficiency/gflops' in line)
    assert logged['efficiency/gflops'] == pytest.approx(cost['flops'] / 1e9)
    assert logged['efficiency/gflops_encoder'] > 0


def test_pictures(work_dir):
    drawn = {path.name for path in work_dir.rglob('vis_image/*.png')}
    assert {'attention_0_1.png', 'attention_1_1.png', 'attention_levels_1.png'} <= drawn
