"""The newer families as a user meets them: train, resume and test, and the commands."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from commands import mmlite
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmdet_tools import run_tools
from mmengine.config import Config

from mmlite.datasets import generate_shapes
from mmlite.openmmlab.checkpoints import load_checkpoint, stock_config

SMALL = Path(__file__).parents[1] / 'configs/small'
# Family -> its small config, and what its test has to measure.
FAMILIES = {
    'ddq': ('lite-ddq-detr-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes', 'coco/bbox_mAP_50'),
    'grounding': ('lite-grounding-dino_r18_h3l1-3p1x1_1xb8-14e_shapes', 'coco/bbox_mAP_50'),
    'mask2former': ('lite-mask2former_r18_h2l1-3p1x1_1xb8-20e_shapes', 'coco/segm_mAP_50'),
    'h_deformable': ('lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes', 'coco/bbox_mAP_50'),
}
RARE = ('ddq', 'h_deformable')  # The others take the same ways.
# There is no small config of H-DETR: this is DINO's without denoising.
H_DEFORMABLE = """
model = _base_.model
del model.dn_cfg
model.update(_delete_=True, type='LiteHDeformableDETR', num_one2many_queries=30)
model.bbox_head.type = 'HDeformableDETRHead'
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with a tiny data set."""
    folder = tmp_path_factory.mktemp('families')
    generate_shapes(folder / 'data/shapes', {'train': 4, 'val': 2})
    return folder


@pytest.mark.parametrize(
    'name', [pytest.param(f, marks=pytest.mark.slow if f in RARE else ()) for f in FAMILIES]
)
def test_family(name, folder, tmp_path, tiny_bert, monkeypatch):
    """Trained, resumed and tested in one process; drawn; its stock weights are a warm start."""
    monkeypatch.setenv('BERT', tiny_bert)
    base, metric = FAMILIES[name]
    config, checkpoint = folder / f'{name}.py', folder / name / 'epoch_2.pth'
    config.write_text(
        f'_base_ = {f"{SMALL / base}.py"!r}\n'
        'train_dataloader = dict(batch_size=2)\n'
        'train_cfg = dict(max_epochs=1, val_interval=3)\n'
        f'work_dir = {name!r}\n' + (H_DEFORMABLE if name == 'h_deformable' else '')
    )
    more = ('--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    test = (config, checkpoint, '--work-dir', f'{name}_test')
    run_tools([('train', config), ('train', config, *more), ('test', *test)], cwd=folder)

    content = load_checkpoint(checkpoint)
    assert (content['meta']['epoch'], content['meta']['iter']) == (2, 4)
    losses = content['message_hub']['log_scalars']
    assert len(losses['train/loss'].data[0]) == 4
    assert ('train/d0.loss_cls_one2many' in losses) == (name == 'h_deformable')
    (metrics,) = (folder / f'{name}_test').glob('*/*.json')
    assert metric in json.loads(metrics.read_text())

    image = folder / 'data/shapes/val/00000.png'
    lite, out = f'{config},{checkpoint}', ('--out', tmp_path / 'picture.png')
    mmlite('visualize', 'attention', lite, image, *out)

    register_all_modules()
    content = Config.fromfile(config)
    stock = MODELS.build(stock_config(copy.deepcopy(content.model)))
    stock.init_weights()
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'stock.pth')
    arguments = (tmp_path / 'stock.pth', tmp_path / 'start.pth', '--from-stock', config)
    arguments += ('--images', image, '--json', tmp_path / 'report.json')
    assert 'entries copied' in mmlite('convert', *arguments)
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['result']['memory'] < report['copied_only']['memory']
