"""``mmlite convert`` on files, as a user runs it."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from click.testing import CliRunner
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from mmlite.cli import main
from mmlite.openmmlab.checkpoints import load_checkpoint as read_checkpoint
from mmlite.openmmlab.checkpoints import to_official

CONFIG = """
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py'
custom_imports = dict(imports=['mmlite'])
ffn_cfg = dict(feedforward_channels=64)
model = dict(
    type='LiteDINO',
    num_queries=30,
    backbone=dict(depth=18, init_cfg=None),
    neck=dict(in_channels=[128, 256, 512], bias=True),
    encoder=dict(schedule='H3L1-(2+1)x1', num_layers=2, layer_cfg=dict(ffn_cfg=ffn_cfg)),
    decoder=dict(num_layers=1, layer_cfg=dict(ffn_cfg=ffn_cfg)),
)
"""


def run(*arguments):
    return CliRunner().invoke(main, ['convert', *map(str, arguments)])


@pytest.fixture(scope='module')
def official(tmp_path_factory):
    """A Lite-DINO file as the authors' code writes it."""
    path = tmp_path_factory.mktemp('official') / 'checkpoint.pth'
    model = MODELS.build(Config.fromstring(CONFIG, '.py').model)
    model.init_weights()
    state = to_official(model.state_dict()).state_dict
    args = Namespace(enc_scale=3, num_expansion=1, nheads=8, output_dir='logs', lr=1e-4)
    torch.save(dict(model=state, args=args, epoch=11, optimizer=dict(state={})), path)
    return path


def test_there_and_back(official, tmp_path):
    target = tmp_path / 'lite_dino.pth'
    result = run(official, target, '--model', 'lite-dino', '--json', tmp_path / 'report.json')
    assert result.exit_code == 0, result.output
    assert 'Lite-DINO H3L1-(2+1)x1' in result.output
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['schedule'] == 'H3L1-(2+1)x1'
    assert report['written'] == [str(target), str(target.with_suffix('.py'))]
    original = torch.load(official, weights_only=False)['model']
    accounted = set(report['mapped']) | set(report['left'])
    assert accounted == set(original)

    config = Config.fromfile(target.with_suffix('.py'))
    model = MODELS.build(config.model)
    checkpoint = load_checkpoint(model, str(target), strict=True)
    assert len(checkpoint['meta']['dataset_meta']['classes']) == 80

    again = tmp_path / 'again.pth'
    result = run(target, again, '--to-official')
    assert result.exit_code == 0, result.output
    back = read_checkpoint(again, allow=[Namespace])['model']
    assert set(back) == set(original)
    assert all(torch.equal(back[name], original[name]) for name in original)
    # The way there once more: the file says its schedule.
    assert run(again, tmp_path / 'once_more.pth').exit_code == 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--model', 'dino'], 'use --model lite-dino'),
        (['--schedule', 'H2L2-(2+1)x1'], 'enc_scale=3, which is H3L1-(2+1)x1'),
        (['--ema'], 'no ema_model'),
        (['--to-official'], 'no Deformable DETR, H-Deformable-DETR, DINO or Lite-DINO in'),
        (['--to-official', '--ema'], 'leave them out'),
    ],
)
def test_refusals(official, tmp_path, arguments, message):
    target = tmp_path / 'target.pth'
    result = run(official, target, *arguments)
    assert result.exit_code == 1
    assert message in ' '.join(result.output.split())
    assert result.output.startswith('Error: ') and 'Traceback' not in result.output
    assert not target.exists()


def test_files_that_are_not_there(official, tmp_path):
    for source, target, message in (
        (tmp_path / 'none.pth', tmp_path / 'target.pth', 'does not exist'),
        (official, tmp_path / 'target.onnx', 'let it end in .pth'),
        (official, tmp_path / 'folder' / 'target.pth', 'create the folder first'),
        (official, official, 'is the source'),
    ):
        result = run(source, target)
        assert result.exit_code == 1 and message in result.output


def test_runs_nothing_that_a_file_carries(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ('ran',)

    torch.save(dict(model={}, args=Evil()), tmp_path / 'evil.pth')
    result = run(tmp_path / 'evil.pth', tmp_path / 'target.pth')
    assert result.exit_code == 1 and 'refused' in result.output and 'ran\n' not in result.output
