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
from small_detectors import small_model

from mmlite.cli import main
from mmlite.openmmlab.checkpoints import load_checkpoint as read_checkpoint
from mmlite.openmmlab.checkpoints import to_official


def run(*arguments):
    return CliRunner().invoke(main, ['convert', *map(str, arguments)])


@pytest.fixture(scope='module')
def official(tmp_path_factory):
    """A Lite-DINO file as the authors' code writes it."""
    path = tmp_path_factory.mktemp('official') / 'checkpoint.pth'
    change = dict(neck=dict(bias=True), bbox_head=dict(num_classes=80))
    model = small_model('DINO', dict(schedule='-(2+1)x1'), **change)
    args = Namespace(enc_scale=3, num_expansion=1, nheads=8, output_dir='logs', lr=1e-4)
    state = to_official(model.state_dict()).state_dict
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
    assert set(report['mapped']) | set(report['left']) == set(original)

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
        (['--to-official'], 'none of Deformable DETR, H-Deformable-DETR, DINO, Lite-DINO in'),
        (['--to-official', '--ema'], 'leave them out'),
    ],
)
def test_refusals(official, tmp_path, arguments, message):
    target = tmp_path / 'target.pth'
    refuse(official, target, *arguments, message=message)
    assert not target.exists()


def refuse(*arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in ' '.join(result.output.split())
    assert result.output.startswith('Error: ') and 'Traceback' not in result.output
    return result.output


def test_files_that_are_not_there(official, tmp_path):
    refuse(tmp_path / 'none.pth', tmp_path / 'target.pth', message='does not exist')
    refuse(official, tmp_path / 'target.onnx', message='let it end in .pth')
    refuse(official, tmp_path / 'folder' / 'target.pth', message='create the folder first')
    refuse(official, official, message='is the source')


def test_runs_nothing_that_a_file_carries(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ('ran',)

    torch.save(dict(model={}, args=Evil()), tmp_path / 'evil.pth')
    output = refuse(tmp_path / 'evil.pth', tmp_path / 'target.pth', message='refused')
    assert 'ran\n' not in output
