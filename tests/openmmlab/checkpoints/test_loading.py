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
    """Pickles as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


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
    content = load_checkpoint(
        save(
            {
                'state_dict': torch.nn.Linear(2, 3).state_dict(),
                'loss': HistoryBuffer([3.0, 1.0], [1, 1]),
                'eta': np.float64(2.5),
                'step': np.int64(7),
                'flags': np.array([True, False]),
                'names': [np.str_('a'), np.array(['cat', 'dog']), np.datetime64('2024-05-06')],
                'plain': [Namespace(lr=0.1), datetime(2024, 5, 6), {1, 2}, Counter([8, 8]), ('a',)],
                'path': Path('/data/a.pth'),
            }
        )
    )
    assert content['state_dict']['weight'].shape == (3, 2)
    assert content['loss'].statistics('mean') == 2.0
    assert (content['eta'], content['step']) == (2.5, 7)
    assert content['flags'].tolist() == [True, False]
    assert [np.size(name) for name in content['names']] == [1, 2, 1]
    assert content['names'][1].tolist() == ['cat', 'dog']
    assert content['plain'] == [Namespace(lr=0.1), datetime(2024, 5, 6), {1, 2}, {8: 2}, ('a',)]
    assert content['path'] == PurePosixPath('/data/a.pth')


def test_reads_either_side_of_numpys_move(reader, tmp_path):
    """Files written with NumPy 1 name numpy.core, those written with NumPy 2 numpy._core."""
    path = tmp_path / 'checkpoint.pth'
    torch.save({'eta': np.float64(2.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    names = [b'numpy._core.multiarray', b'numpy.core.multiarray']
    names.sort(key=content.count)
    path.write_bytes(content.replace(names[1], names[0]))
    assert path.read_bytes() != content
    assert load_checkpoint(path)['eta'] == 2.5


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
    loss = [{'loss': 1.0}] if 'Plateau' in name else []
    runs = []
    for _ in range(2):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        options = dict(type=f'mmengine.{name.strip()}', optimizer=optimizer, **SCHEDULERS[name])
        runs.append((PARAM_SCHEDULERS.build(options), optimizer))
    for _ in range(3):
        runs[0][1].step()
        runs[0][0].step(*loss)
    for loaded, resumed in zip(load_checkpoint(save([x.state_dict() for x in runs[0]])), runs[1]):
        resumed.load_state_dict(loaded)
    for _ in range(2):
        for scheduler, optimizer in runs:
            optimizer.step()
            scheduler.step(*loss)
        assert runs[0][1].param_groups[0]['lr'] == runs[1][1].param_groups[0]['lr']


@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'AmpOptimWrapper'])
def test_every_optimizer_wrapper_goes_on(reader, save, wrapper, monkeypatch):
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    wrapper = OPTIM_WRAPPERS.get(f'mmengine.{wrapper}')(optimizer=optimizer)
    state = wrapper.state_dict()
    assert load_checkpoint(save(state)).keys() == state.keys()


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
    call = [a.format(trace) if isinstance(a, str) else a for a in call]
    path = save({'state_dict': {}, 'meta': RunsCode(*call)})
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


def test_the_folder_of_the_user(save, tmp_path, monkeypatch):
    save({'a': 1})
    monkeypatch.setenv('HOME', str(tmp_path))
    assert load_checkpoint('~/checkpoint.pth') == {'a': 1}


@pytest.mark.skipif(not loading._TORCH_KNOWS_SAFE_GLOBALS, reason='torch < 2.6 takes it')
def test_names_a_dtype_that_is_refused(save):
    path, dtype = save({'meta': np.array([None])}), type(np.dtype(object))
    with pytest.raises(ValueError, match=rf'it holds {dtype.__module__}\.{dtype.__name__},'):
        load_checkpoint(path)
    assert load_checkpoint(path, allow=[dtype])['meta'].tolist() == [None]


@pytest.mark.parametrize('content', [b'', b'hello', b'PK\x03\x04 no zip', b'\x80\x02}q'])
def test_says_that_a_file_is_no_checkpoint(reader, tmp_path, content):
    path = tmp_path / 'notes.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'notes\.pth is not a checkpoint') as refusal:
        load_checkpoint(path)
    assert 'weights_only' not in str(refusal.value)  # which is no argument here
    with pytest.raises(FileNotFoundError, match=r'nothing\.pth does not exist'):
        load_checkpoint(tmp_path / 'nothing.pth')


def test_mmengine_reads_through_it(reader, save):
    """The loader of load_from, resume and mim test, from ``import mmlite`` on."""
    model = torch.nn.Linear(2, 3)
    content = {'state_dict': model.state_dict(), 'loss': HistoryBuffer([1.0], [1])}
    assert mmengine_load_checkpoint(model, save(content))['loss'].current() == 1.0
    with pytest.raises(ValueError, match='is refused'):
        mmengine_load_checkpoint(model, save({**content, 'meta': RunsCode(os.system, 'true')}))
