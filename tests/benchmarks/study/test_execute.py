"""A study ends at what it would have come to, however often it is stopped."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import small_study
import torch
from mmdet.utils import register_all_modules
from mmengine.runner import Runner

from benchmarks.study import execute as execution
from benchmarks.study import run as one_run
from benchmarks.study.execute import Study, execute, unfinished
from benchmarks.study.plan import read_plan
from benchmarks.study.record import NonFiniteLoss, Recorder

register_all_modules()


def no_progress(text, total):
    return lambda note='': None


@pytest.fixture
def study(tmp_path, monkeypatch):
    # Seconds of asking compilers for their versions and of formatting the config.
    for name in ('_log_env', 'dump_config'):
        monkeypatch.setattr(Runner, name, lambda *args: None)
    found = Study(read_plan(str(small_study.write(tmp_path))), tmp_path / 'out')
    found.check()
    return found


class Fake:
    """Stands in for a process: leaves a result at once, or does not."""

    started: ClassVar[list] = []
    fails: ClassVar[set] = set()

    def __init__(self, folder, core, gpus):
        self.folder, self.core = folder, core
        self.started.append((folder.parent.name, core))

    def listen(self, run, events):
        if self.folder.parent.name not in self.fails:
            from mmengine.config import Config

            study = Config.fromfile(self.folder / 'config.py').study
            (self.folder / 'weights.pth').touch()
            content = {**study, 'finite': True}
            (self.folder / 'result.json').write_text(json.dumps(content))
        events.put((run, None))

    def end(self, step):
        pass

    def why(self):
        return 'it broke'


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(execution, '_Process', Fake)
    monkeypatch.setattr(execution, '_cores', lambda: [5, 6])
    monkeypatch.setattr(Study, 'draw', lambda self, start: None)
    monkeypatch.setattr(Fake, 'started', [])
    monkeypatch.setattr(Fake, 'fails', set())
    return Fake


def test_finished_runs_are_not_repeated(study, fake):
    ended = []
    assert execute(study, 1, no_progress, lambda *a: ended.append(a))
    assert fake.started == [('stock', 5), ('lite', 5), ('warm', 5)]
    (study.folder / 'drawn/lite/seed0/result.json').unlink()
    fake.started.clear()
    assert execute(study, 2, no_progress, lambda *a: ended.append(a))
    assert fake.started == [('lite', 5)]
    assert len(ended) == 4


def test_a_warm_start_waits_for_its_teacher(study, fake):
    fake.fails = {'stock'}
    ended = {}
    assert not execute(study, 2, no_progress, lambda run, r, why: ended.update({run.name: why}))
    assert [name for name, _ in fake.started] == ['stock', 'lite']
    assert ended['drawn/stock/seed0'] == 'it broke'
    assert 'left no weights' in ended['drawn/warm/seed0']
    fake.fails.clear()
    assert execute(study, 2, no_progress, lambda *a: None)
    assert [name for name, _ in fake.started[2:]] == ['stock', 'warm']


def test_another_config_is_not_mixed_in(study, fake, tmp_path):
    execute(study, 1, no_progress, lambda *a: None)
    small = {**small_study.content()['set'], 'train_dataloader': {'batch_size': 2}}
    changed = Study(read_plan(str(small_study.write(tmp_path, set=small))), study.folder)
    with pytest.raises(ValueError, match='another config than the plan has now'):
        changed.check()


@pytest.mark.slow
def test_killed_run_ends_where_it_would_have(study):
    """The same losses and metrics, whether or not it was stopped in the second epoch."""
    study.draw(no_progress)
    run = study.plan.runs[1]
    folder = study.prepare(run)

    def stop(share, note):
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_run.train(folder, report=stop)
    assert unfinished(study) == {'drawn, lite, seed 0': 1}
    one_run.train(folder)
    resumed = study.result(run)
    weights = torch.load(folder / 'weights.pth', weights_only=True)['state_dict']
    assert not list(folder.glob('epoch_*.pth'))
    assert unfinished(study) == {}

    (folder / 'result.json').unlink()
    one_run.train(folder)
    whole = study.result(run)
    assert (resumed['resumed'], whole['resumed']) == (1, 0)
    for key in ('loss', 'curve', 'metrics', 'iterations', 'fingerprint', 'encoder_gflops'):
        assert resumed[key] == whole[key], key
    assert [point['epoch'] for point in whole['curve']] == [1, 2]
    assert whole['iterations'] == 4
    for name, value in torch.load(folder / 'weights.pth', weights_only=True)['state_dict'].items():
        torch.testing.assert_close(weights[name], value)


def test_loss_that_is_not_finite_is_a_result(study, monkeypatch):
    study.draw(no_progress)
    run = study.plan.runs[0]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        original(self, runner, batch_idx, data_batch, {'loss': torch.tensor(float('nan'))})

    original = Recorder.after_train_iter
    monkeypatch.setattr(Recorder, 'after_train_iter', after_train_iter)
    folder = study.prepare(run)
    one_run.train(folder)
    result = study.result(run)
    assert not result['finite']
    assert result['problem'] == 'the loss is nan at iteration 1 of 4'
    assert not (folder / 'weights.pth').exists()
    assert issubclass(NonFiniteLoss, RuntimeError)
