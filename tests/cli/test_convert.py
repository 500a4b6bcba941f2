import json
from argparse import Namespace

import pytest
import torch
from commands import mmlite, refused
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from small_detectors import small_model

from mmlite.openmmlab.checkpoints import load_checkpoint as read_checkpoint
from mmlite.openmmlab.checkpoints import to_official


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
    options = ('--model', 'lite-dino', '--json', tmp_path / 'report.json')
    assert 'Lite-DINO H3L1-(2+1)x1' in mmlite('convert', official, target, *options)
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
    mmlite('convert', target, again, '--to-official')
    back = read_checkpoint(again, allow=[Namespace])['model']
    assert set(back) == set(original)
    assert all(torch.equal(back[name], original[name]) for name in original)
    # The way there once more: the file says its schedule.
    mmlite('convert', again, tmp_path / 'once_more.pth')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('SOURCE target.pth --model dino', 'use --model lite-dino'),
        ('SOURCE target.pth --schedule H2L2-(2+1)x1', r'enc_scale=3, which is H3L1-\(2\+1\)x1'),
        ('SOURCE target.pth --to-official', 'none of Deformable DETR, H-Deformable-DETR, DINO, '),
        ('SOURCE target.pth --to-official --ema', 'leave them out'),
        ('SOURCE target.pth --from-stock lite.py', 'and images: --from-stock'),
        ('none.pth target.pth', 'does not exist'),
        ('SOURCE target.onnx', 'let it end in .pth'),
        ('SOURCE folder/target.pth', 'create the folder first'),
        ('SOURCE SOURCE', 'is the source'),
    ],
)
def test_refusals(official, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    output = refused(message, 'convert', *arguments.replace('SOURCE', str(official)).split())
    assert output.startswith('Error: ')
    assert not any(tmp_path.iterdir())
