from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint

from mmlite.openmmlab.checkpoints import load_checkpoint, loading


class RunsCode:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Unknown:
    pass


@pytest.fixture(params=[True, False], ids=['torch', 'before-2.6'])
def reader(request, monkeypatch):
    """Both ways of reading; the older one works on today's torch as well."""
    if request.param and not loading._TORCH_KNOWS_SAFE_GLOBALS:
        pytest.skip('torch < 2.6 takes no safe globals by name')
    monkeypatch.setattr(loading, '_TORCH_KNOWS_SAFE_GLOBALS', request.param)


@pytest.fixture(params=[True, False], ids=['zip', 'legacy'])
def save(request, tmp_path):
    def save(content):
        path = tmp_path / 'checkpoint.pth'
        torch.save(content, path, _use_new_zipfile_serialization=request.param)
        return str(path)

    return save


def test_reads_what_mmengine_writes(reader, save):
    history = HistoryBuffer([3.0, 1.0], [1, 1])
    path = save(
        {
            'state_dict': torch.nn.Linear(2, 3).state_dict(),
            'message_hub': {'log_scalars': {'loss': history}, 'eta': np.float64(2.5)},
            'param_schedulers': [{'milestones': Counter([8, 11])}],
            'meta': {'flags': np.array([True, False]), 'step': np.int64(7), 'classes': ('a', 'b')},
        }
    )
    content = load_checkpoint(path)
    assert content['state_dict']['weight'].shape == (3, 2)
    assert content['message_hub']['log_scalars']['loss'].statistics('mean') == 2.0
    assert content['message_hub']['eta'] == 2.5
    assert content['param_schedulers'] == [{'milestones': {8: 1, 11: 1}}]
    assert content['meta']['flags'].tolist() == [True, False]
    assert content['meta']['step'] == 7


def test_reads_either_side_of_numpys_move(reader, tmp_path):
    """Files written with NumPy 1 name numpy.core, those written with NumPy 2 numpy._core."""
    written, moved = tmp_path / 'written.pth', tmp_path / 'moved.pth'
    torch.save({'eta': np.float64(2.5)}, written, _use_new_zipfile_serialization=False)
    content = written.read_bytes()
    if b'numpy._core.multiarray' in content:
        moved.write_bytes(content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    else:
        moved.write_bytes(content.replace(b'numpy.core.multiarray', b'numpy._core.multiarray'))
    assert moved.read_bytes() != content
    assert load_checkpoint(moved)['eta'] == 2.5


@pytest.mark.parametrize(
    ('call', 'name'),
    [
        ((os.system, 'touch {}'), f'{os.system.__module__}.system'),
        ((eval, "open('{}', 'w')"), 'eval'),
        ((getattr, torch.Tensor, 'numpy'), 'getattr'),
        ((getattr, HistoryBuffer, '__init__'), 'getattr'),
    ],
    ids=['os.system', 'eval', 'getattr-of-another-class', 'getattr-of-another-method'],
)
def test_refuses_a_file_that_runs_code(reader, save, tmp_path, call, name):
    trace = tmp_path / 'ran'
    function, *arguments = call
    arguments = [a.format(trace) if isinstance(a, str) else a for a in arguments]
    path = save({'state_dict': {}, 'meta': RunsCode(function, *arguments)})
    with pytest.raises(ValueError, match=rf'is refused: it holds .*{name}'):
        load_checkpoint(path)
    assert not trace.exists()


def test_refuses_an_unknown_class_unless_allowed(reader, save):
    path = save({'meta': Unknown()})
    with pytest.raises(ValueError, match=r'is refused: it holds .*Unknown'):
        load_checkpoint(path)
    assert isinstance(load_checkpoint(path, allow=[Unknown])['meta'], Unknown)


@pytest.mark.parametrize('content', [b'', b'hello', b'PK\x03\x04 no zip', b'\x80\x02}q'])
def test_says_that_a_file_is_no_checkpoint(reader, tmp_path, content):
    path = tmp_path / 'notes.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'notes\.pth is not a checkpoint'):
        load_checkpoint(path)


def test_says_that_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nothing\.pth does not exist'):
        load_checkpoint(tmp_path / 'nothing.pth')


def test_mmengine_reads_through_it(reader, save):
    """The loader of load_from, resume and mim test, from ``import mmlite`` on."""
    model = torch.nn.Linear(2, 3)
    history = HistoryBuffer([1.0], [1])
    path = save({'state_dict': model.state_dict(), 'message_hub': {'loss': history}})
    content = mmengine_load_checkpoint(model, path)
    assert content['message_hub']['loss'].current() == 1.0
    path = save({'state_dict': model.state_dict(), 'meta': RunsCode(os.system, 'true')})
    with pytest.raises(ValueError, match='is refused'):
        mmengine_load_checkpoint(model, path)
