"""The newer families as a user meets them: train, resume and test, and the commands."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmdet_tools import run_tools
from mmengine.config import Config

from mmlite.cli import main
from mmlite.datasets import generate_panoptic, generate_shapes
from mmlite.openmmlab.checkpoints import load_checkpoint, stock_config
from mmlite.openmmlab.families import find_holder

SMALL = Path(__file__).parents[1] / 'configs/small'
# Family -> its small config, and what its test has to measure.
FAMILIES = {
    'ddq': ('lite-ddq-detr-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py', 'coco/bbox_mAP_50'),
    'grounding': ('lite-grounding-dino_r18_h3l1-3p1x1_1xb8-14e_shapes.py', 'coco/bbox_mAP_50'),
    'mask2former': ('lite-mask2former_r18_h2l1-3p1x1_1xb8-20e_shapes.py', 'coco/segm_mAP_50'),
    'panoptic': (
        'lite-mask2former_r18_h2l1-3p1x1_1xb8-20e_shapes-panoptic.py',
        'coco_panoptic/PQ',
    ),
    'h_deformable': ('lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py', 'coco/bbox_mAP_50'),
}
RARE = ('ddq', 'panoptic', 'h_deformable')  # The others take the same ways.
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
    for split in ('train', 'val'):
        generate_panoptic(folder / 'data/shapes', split)
    return folder


@pytest.fixture(
    scope='module',
    params=[pytest.param(f, marks=pytest.mark.slow if f in RARE else ()) for f in FAMILIES],
)
def trained(request, folder, tiny_bert):
    """A family's name, its config, and its weights: trained, resumed and tested in one process."""
    name = request.param
    if name == 'panoptic':
        pytest.importorskip('panopticapi', reason='panopticapi is not installed')
    config, checkpoint = folder / f'{name}.py', folder / name / 'epoch_2.pth'
    config.write_text(
        f'_base_ = {str(SMALL / FAMILIES[name][0])!r}\n'
        'train_dataloader = dict(batch_size=2)\n'
        'train_cfg = dict(max_epochs=1, val_interval=3)\n'
        f'work_dir = {name!r}\n' + (H_DEFORMABLE if name == 'h_deformable' else '')
    )
    more = ('--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    test = (config, checkpoint, '--work-dir', f'{name}_test')
    runs = [('train', config), ('train', config, *more), ('test', *test)]
    run_tools(runs, cwd=folder, BERT=tiny_bert)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('BERT', tiny_bert)
        yield name, config, checkpoint


def test_resumes_and_tests(trained, folder):
    name, _, checkpoint = trained
    content = load_checkpoint(checkpoint)
    assert (content['meta']['epoch'], content['meta']['iter']) == (2, 4)
    assert len(content['message_hub']['log_scalars']['train/loss'].data[0]) == 4
    (metrics,) = (folder / f'{name}_test').glob('*/*.json')
    assert FAMILIES[name][1] in json.loads(metrics.read_text())
    if name == 'h_deformable':
        assert 'train/d0.loss_cls_one2many' in content['message_hub']['log_scalars']


def test_another_schedule_is_refused(trained):
    _, config, checkpoint = trained
    register_all_modules()
    model = Config.fromfile(config).model
    encoder = find_holder(model)[1].encoder
    schedule = str(encoder.schedule)
    encoder.schedule = 'H1L2-(3+1)x1' if schedule.startswith('H2') else 'H2L2-(3+1)x1'
    with pytest.raises(ValueError, match='were trained with schedule ' + schedule[:4]):
        MODELS.build(model).load_state_dict(load_checkpoint(checkpoint)['state_dict'])


def test_commands(trained, folder, tmp_path):
    """visualize draws, and a warm start from stock weights fits."""
    _, config, checkpoint = trained

    def run(*arguments: str | Path) -> str:
        done = CliRunner().invoke(main, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return done.output

    image = folder / 'data/shapes/val/00000.png'
    lite = f'{config},{checkpoint}'
    run('visualize', 'attention', lite, image, '--out', tmp_path / 'attention.png')
    if 'cross_attn.sampling_offsets' in ' '.join(load_checkpoint(checkpoint)['state_dict']):
        run('visualize', 'attention', lite, image, '--object', 0, '--out', tmp_path / 'object.png')
    run('visualize', 'detections', lite, image, '--score', 0, '--out', tmp_path / 'found.png')
    run('visualize', 'levels', lite, image.parent, '--out', tmp_path / 'levels.png')

    register_all_modules()
    content = Config.fromfile(config)
    content.model = stock_config(content.model)
    content.dump(tmp_path / 'stock.py')
    stock = MODELS.build(copy.deepcopy(content.model))
    stock.init_weights()
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'stock.pth')
    arguments = (tmp_path / 'stock.pth', tmp_path / 'start.pth', '--from-stock', config)
    printed = run('convert', *arguments, '--images', image, '--json', tmp_path / 'report.json')
    assert 'entries copied' in printed
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['result']['memory'] < report['copied_only']['memory']
