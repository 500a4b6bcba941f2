"""The newer families as a user meets them: mim train, resume and test, and the commands."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmlite.checkpoints import load_checkpoint, stock_config
from mmlite.checkpoints.config import find_encoder
from mmlite.cli import main
from mmlite.datasets import generate_panoptic, generate_shapes

pytest.importorskip('mim', reason='openmim is not installed')

ROOT = Path(__file__).parents[1]
FAMILIES = {
    'ddq': ('lite-ddq-detr-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py', 'coco/bbox_mAP_50'),
    'grounding': ('lite-grounding-dino_r18_h3l1-3p1x1_1xb8-14e_shapes.py', 'coco/bbox_mAP_50'),
    'mask2former': ('lite-mask2former_r18_h2l1-3p1x1_1xb8-20e_shapes.py', 'coco/segm_mAP_50'),
    'panoptic': (
        'lite-mask2former_r18_h2l1-3p1x1_1xb8-20e_shapes-panoptic.py',
        'coco_panoptic/PQ',
    ),
}


# The first epoch of all families in one process; what a user does comes after.
TRAIN = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner

for name in sys.argv[1:]:
    Runner.from_cfg(Config.fromfile(f'{name}.py')).train()
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_bert):
    """A working directory with a tiny data set, and the families' configs trained for an epoch."""
    folder = tmp_path_factory.mktemp('families')
    generate_shapes(folder / 'data/shapes', {'train': 4, 'val': 2})
    for split in ('train', 'val'):
        generate_panoptic(folder / 'data/shapes', split)
    for name, (config, _) in FAMILIES.items():
        (folder / f'{name}.py').write_text(
            f'_base_ = {str(ROOT / "configs/small" / config)!r}\n'
            'train_dataloader = dict(batch_size=2)\n'
            'train_cfg = dict(max_epochs=1, val_interval=3)\n'
            f'work_dir = {name!r}\n'
        )
    names = [name for name in FAMILIES if name != 'panoptic' or find_spec('panopticapi')]
    run_python('-c', TRAIN, *names, cwd=folder, bert=tiny_bert)
    return folder


def mim(*arguments: str | Path, cwd: Path, bert: str) -> str:
    return run_python('-c', 'from mim.cli import cli; cli()', *arguments, cwd=cwd, bert=bert)


def run_python(*arguments: str | Path, cwd: Path, bert: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', 'BERT': bert},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    return process.stdout


@pytest.fixture(scope='module', params=FAMILIES)
def trained(request, folder, tiny_bert):
    """A family's name, its config, and its weights after a second epoch, which mim resumed."""
    name = request.param
    if name == 'panoptic':
        pytest.importorskip('panopticapi', reason='panopticapi is not installed')
    config = folder / f'{name}.py'
    train = ('train', 'mmdet', config, '--work-dir', folder / name, '--gpus', '0', '--resume')
    mim(*train, '--cfg-options', 'train_cfg.max_epochs=2', cwd=folder, bert=tiny_bert)
    os.environ['BERT'] = tiny_bert
    yield name, config, folder / name / 'epoch_2.pth'
    del os.environ['BERT']


def test_resumes_and_tests(trained, folder, tiny_bert):
    name, config, checkpoint = trained
    content = load_checkpoint(checkpoint)
    assert (content['meta']['epoch'], content['meta']['iter']) == (2, 4)
    assert len(content['message_hub']['log_scalars']['train/loss'].data[0]) == 4
    test = ('test', 'mmdet', config, '--checkpoint', checkpoint, '--gpus', '0')
    mim(*test, '--work-dir', folder / f'{name}_test', cwd=folder, bert=tiny_bert)
    (metrics,) = (folder / f'{name}_test').glob('*/*.json')
    assert FAMILIES[name][1] in json.loads(metrics.read_text())


def test_another_schedule_is_refused(trained):
    _, config, checkpoint = trained
    register_all_modules()
    model = Config.fromfile(config).model
    encoder = find_encoder(model)[1].encoder
    schedule = str(encoder.schedule)
    encoder.schedule = 'H1L2-(3+1)x1' if schedule.startswith('H2') else 'H2L2-(3+1)x1'
    with pytest.raises(ValueError, match='were trained with schedule ' + schedule[:4]):
        MODELS.build(model).load_state_dict(load_checkpoint(checkpoint)['state_dict'])


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def test_commands(trained, folder, tmp_path):
    """visualize draws, and a warm start from stock weights fits."""
    _, config, checkpoint = trained
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
    printed = run('convert', *arguments, '--image', image, '--json', tmp_path / 'report.json')
    assert 'entries copied' in printed
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['result']['memory'] < report['copied_only']['memory']
