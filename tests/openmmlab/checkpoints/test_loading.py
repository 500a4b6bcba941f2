from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
from datetime import datetime
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.registry import OPTIM_WRAPPERS, PARAM_SCHEDULERS
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


SCHEDULERS = {
    'StepLR': dict(step_size=1),
    'MultiStepLR': dict(milestones=[1, 2]),
    'ConstantLR': {},
    'LinearLR': {},
    'ExponentialLR': dict(gamma=0.5),
    'PolyLR': {},
    'CosineAnnealingLR': dict(T_max=3),
    'CosineRestartLR': dict(periods=[2], eta_min=0.1),
    'OneCycleLR': dict(eta_max=1, total_steps=9),
    'OneCycleLR ': dict(eta_max=1, total_steps=9, anneal_strategy='linear'),
    'ReduceOnPlateauLR': dict(monitor='loss'),
}


@pytest.mark.parametrize('name', SCHEDULERS)
def test_every_scheduler_goes_on(reader, save, name):
    def build():
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        options = dict(type=f'mmengine.{name.strip()}', optimizer=optimizer, **SCHEDULERS[name])
        return PARAM_SCHEDULERS.build(options), optimizer

    (scheduler, optimizer), (resumed, other) = build(), build()
    for _ in range(3):
        optimizer.step()
        scheduler.step(*([{'loss': 1.0}] if 'Plateau' in name else []))
    saved = dict(scheduler=scheduler.state_dict(), optimizer=optimizer.state_dict())
    loaded = load_checkpoint(save(saved))
    other.load_state_dict(loaded['optimizer'])
    resumed.load_state_dict(loaded['scheduler'])
    for _ in range(2):
        for each, its in ((scheduler, optimizer), (resumed, other)):
            its.step()
            each.step(*([{'loss': 1.0}] if 'Plateau' in name else []))
        assert other.param_groups[0]['lr'] == optimizer.param_groups[0]['lr']


@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'AmpOptimWrapper'])
def test_every_optimizer_wrapper_goes_on(reader, save, wrapper, monkeypatch):
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    wrapper = OPTIM_WRAPPERS.get(f'mmengine.{wrapper}')(optimizer=optimizer)
    state = wrapper.state_dict()
    assert load_checkpoint(save(state)).keys() == state.keys()


def test_reads_plain_data_of_others(reader, save):
    content = dict(
        args=Namespace(lr=0.1), at=datetime(2024, 5, 6), path=Path('/data/a.pth'), ids={1, 2}
    )
    assert load_checkpoint(save(content)) == {**content, 'path': PurePosixPath('/data/a.pth')}


@pytest.mark.parametrize(
    ('call', 'name'),
    [
        ((os.system, 'touch {}'), f'{os.system.__module__}.system'),
        ((eval, "open('{}', 'w')"), 'eval'),
        ((getattr, torch.Tensor, 'numpy'), 'getattr'),
        ((getattr, HistoryBuffer, '__init__'), 'getattr'),
        ((getattr, OneCycleParamScheduler, 'step'), 'getattr'),
    ],
    ids=['os.system', 'eval', 'another-class', 'another-method', 'method-of-a-scheduler'],
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
    with pytest.raises(ValueError, match=rf'is refused: it holds {__name__}\.Unknown') as refusal:
        load_checkpoint(path)
    assert isinstance(load_checkpoint(path, allow=[Unknown])['meta'], Unknown)
    if hasattr(torch.serialization, 'get_safe_globals'):
        before = torch.serialization.get_safe_globals()
        try:
            exec(str(refusal.value).partition('config: ')[2])  # the line that the refusal names
            assert isinstance(load_checkpoint(path)['meta'], Unknown)
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


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
