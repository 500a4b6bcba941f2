import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import mmlite, refused

from mmlite.openmmlab.checkpoints import load_checkpoint


@pytest.mark.parametrize(
    ('task', 'full', 'what', 'encoder'),
    [
        ('detection', (), 'boxes', 'encoder.'),
        ('segmentation', (), 'masks', 'pixel_decoder.encoder.'),
        pytest.param('detection', ('--full',), 'boxes', 'encoder.', marks=pytest.mark.slow),
    ],
)
def test_trains_evaluates_and_draws(tmp_path, monkeypatch, task, full, what, encoder):
    # Two epochs teach it nothing, and there has to be something to draw.
    monkeypatch.setattr(importlib.import_module('mmlite.cli.demo'), 'SHOWN_SCORE', 0.0)
    out = tmp_path / 'demo'
    sizes = ('--epochs', 2, '--train-images', 8, '--val-images', 2)
    output = mmlite('demo', '--task', task, '--out', out, *sizes, *full)
    results = json.loads((out / 'results.json').read_text())
    assert all(0 <= results[name] <= 1 for name in ('AP', 'AP50'))
    assert 0 < results['encoder_gflops'] < results['stock_encoder_gflops']
    assert min(results['encoder_ms'], results['stock_encoder_ms']) > 0
    for text in ('Epoch 1 of 2: loss ', 'Epoch 2 of 2: loss ', ' s left', 'APm', 'GFLOPs'):
        assert text in output
    assert f'COCO metrics of {what} after 2 epochs' in output
    assert (out / 'predictions.png').read_bytes().startswith(b'\x89PNG')
    content = load_checkpoint(out / 'epoch_2.pth')
    assert content['meta']['epoch'] == 2
    assert f'{encoder}schedule_code' in ' '.join(content['state_dict'])

    path = next(out.glob('*.py'))
    commands = [line[2:] for line in output.splitlines() if line.startswith('  mmlite ')]
    detect, attention, export = (shlex.split(command)[1:] for command in commands)
    assert export[:2] == ['export', f'{out}/{path.name}'] and Path(export[1]).is_file()
    for command in (detect, attention):
        mmlite(*command)
    assert (out / 'detected/00001.png').is_file() and (out / 'attention.png').is_file()


@pytest.mark.parametrize('place', ['file', 'file/below'])
def test_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / 'file').write_text('in the way')
    refused('choose another with --out|is a file', 'demo', '--out', tmp_path / place)


def test_chooses_how_threads_wait_before_torch_is_imported():
    code = (
        'import os, sys; from mmlite.cli.demo import _sleep_while_waiting as f; f()\n'
        'print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)'
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('OMP_', 'GOMP_'))}
    for name, value, policy in (
        ('UNRELATED', '', 'PASSIVE'),
        ('OMP_WAIT_POLICY', 'ACTIVE', 'ACTIVE'),
        ('GOMP_SPINCOUNT', '7', 'None'),
    ):
        command = [sys.executable, '-c', code]
        printed = subprocess.check_output(command, env={**environment, name: value}, text=True)
        assert printed.split() == [policy, 'False']
