"""Training, resuming and testing as a user does it: through mim, in processes of their own.

mim does not know the continuation under MMDetection's name: there it is MMDetection's own scripts.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from mmdet_tools import run_python, run_tools

from mmlite.datasets import generate_shapes
from mmlite.openmmlab.checkpoints import load_checkpoint

pytest.importorskip('mim', reason='openmim is not installed')

CONFIG = 'mmlite::small/lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a tiny data set and a config for it, whose base has a package's name."""
    folder = tmp_path_factory.mktemp('mim')
    generate_shapes(folder / 'data/shapes', {'train': 8, 'val': 4})
    (folder / 'config.py').write_text(
        f'_base_ = {CONFIG!r}\n'
        'train_dataloader = dict(batch_size=2)\n'
        'train_cfg = dict(max_epochs=1)\n'
        "work_dir = 'work'\n"
    )
    return folder


def mim(*arguments: str | Path, cwd: Path) -> str:
    return run_python('-c', 'from mim.cli import cli; cli()', *arguments, cwd=cwd)


def mmdetection(tool: str, config: str, *arguments: str | Path, cwd: Path) -> str:
    """Train or test, as docs/get-started.md says it and docs/support.md for the continuation."""
    try:
        version('mmdet')
    except PackageNotFoundError:
        positional = [word for word in arguments if word != '--checkpoint']
        return run_tools([(tool, config, *positional)], cwd=cwd)
    return mim(tool, 'mmdet', config, '--gpus', '0', *arguments, cwd=cwd)


def test_train_and_test(folder):
    mmdetection('train', 'config.py', cwd=folder)
    assert load_checkpoint(folder / 'work/epoch_1.pth')['meta']['epoch'] == 1

    checkpoint = ('--checkpoint', folder / 'work/epoch_1.pth')
    mmdetection('test', 'config.py', *checkpoint, '--work-dir', folder / 'test', cwd=folder)
    (metrics,) = folder.glob('test/*/*.json')
    assert 'coco/bbox_mAP_50' in json.loads(metrics.read_text())


@pytest.mark.slow
def test_resume(folder):
    for more in ((), ('--resume', '--cfg-options', 'train_cfg.max_epochs=2')):
        mmdetection('train', 'config.py', '--work-dir', 'resumed', *more, cwd=folder)
    resumed = load_checkpoint(folder / 'resumed/epoch_2.pth')
    assert resumed['meta']['epoch'] == 2
    assert resumed['meta']['iter'] == 8  # 4 of them before it was stopped
    assert len(resumed['message_hub']['log_scalars']['train/loss'].data[0]) == 8


def test_search_lists_the_configs(folder):
    listed = mim('search', 'mmlite-detr', '--valid-config', cwd=folder)
    assert 'lite-dino-4scale_r50_h3l1-2p1x3_8xb2-12e_coco' in listed
