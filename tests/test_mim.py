"""Training and testing as a user does it: through mim, in processes of their own.

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

# A base that has a package's name.
CONFIG = """
_base_ = 'mmlite::small/lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1)
work_dir = 'work'
"""


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


def test_train_and_test(tmp_path):
    generate_shapes(tmp_path / 'data/shapes', {'train': 8, 'val': 4})
    (tmp_path / 'config.py').write_text(CONFIG)
    mmdetection('train', 'config.py', cwd=tmp_path)
    assert load_checkpoint(tmp_path / 'work/epoch_1.pth')['meta']['epoch'] == 1

    checkpoint = ('--checkpoint', tmp_path / 'work/epoch_1.pth')
    mmdetection('test', 'config.py', *checkpoint, '--work-dir', tmp_path / 'test', cwd=tmp_path)
    (metrics,) = tmp_path.glob('test/*/*.json')
    assert 'coco/bbox_mAP_50' in json.loads(metrics.read_text())


def test_search_lists_the_configs(tmp_path):
    listed = mim('search', 'mmlite-detr', '--valid-config', cwd=tmp_path)
    assert 'lite-dino-4scale_r50_h3l1-2p1x3_8xb2-12e_coco' in listed
