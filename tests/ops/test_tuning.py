"""The choice of a launch configuration, with times that are made up: no kernel runs here."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('triton', minversion='3.0')

from triton.runtime.errors import OutOfResources

from mmlite.ops import triton as backend
from mmlite.ops.triton import tuning

CONFIGS = tuple(tuning.Config(2**i, 4) for i in range(3))
SLOW, FAST, MIDDLE = CONFIGS


@pytest.fixture(autouse=True)
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)


class Device:
    """A made-up device: what it is asked to run takes ``times`` of it, or fails."""

    def __init__(self, monkeypatch):
        self.times = dict(zip(CONFIGS, (3.0, 1.0, 2.0)))
        self.fails = {}  # config -> what is raised
        self.timed = []
        self.may_time = True
        monkeypatch.setattr(tuning, '_clock', self.clock)
        monkeypatch.setattr(tuning, '_may_time', lambda: self.may_time)

    def clock(self, launch, config):
        self.timed.append(launch(config))
        return self.times[config]

    def launch(self, config):
        if config in self.fails:
            raise self.fails[config]
        return config


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.fixture
def tuner(tmp_path):
    return tuning.Tuner(tmp_path)


def run(tuner, device, key='key', configs=CONFIGS, maker='a GPU'):
    return tuner.run(device.launch, key, configs, maker)


def test_takes_the_fastest_and_times_once(tuner, device):
    device.may_time = False
    assert run(tuner, device) == SLOW  # the rule
    device.may_time = True
    assert run(tuner, device) == FAST
    assert set(device.timed) == set(CONFIGS)
    device.timed.clear()
    assert run(tuner, device) == FAST and not device.timed
    run(tuner, device, key='another key')
    assert device.timed


def test_rounds_go_through_all_candidates(tuner, device):
    """So that a device that slows down slows all of them down."""
    run(tuner, device)
    assert device.timed[: 2 * len(CONFIGS)] == [*CONFIGS, *CONFIGS]


def test_deterministic_algorithms_take_the_rule(tuner, device):
    run(tuner, device)
    torch.use_deterministic_algorithms(True)
    assert run(tuner, device) == SLOW


@pytest.mark.parametrize(
    'error', [OutOfResources(300_000, 232_448, 'shared memory'), torch.cuda.OutOfMemoryError()]
)
def test_what_does_not_fit_is_passed_over(tuner, device, error):
    device.fails[FAST] = error
    assert run(tuner, device) == MIDDLE


def test_memory_that_runs_out_while_timing(tuner, device):
    calls = []

    def launch(config):
        calls.append(config)
        if config == FAST and calls.count(FAST) > 2:
            raise torch.cuda.OutOfMemoryError
        return config

    assert tuner.run(launch, 'key', CONFIGS, 'a GPU') == MIDDLE


def test_a_rule_that_does_not_fit_gives_way(tuner, device):
    device.may_time = False
    device.fails = dict.fromkeys((SLOW, FAST), OutOfResources(1, 0, 'registers'))
    assert run(tuner, device) == MIDDLE
    launched = []
    tuner.run(launched.append, 'key', CONFIGS, 'a GPU')
    assert launched == [MIDDLE]  # the others are not tried again
    device.fails[MIDDLE] = OutOfResources(1, 0, 'registers')
    with pytest.raises(OutOfResources):
        run(tuner, device)


def test_other_errors_are_not_hidden(tuner, device):
    device.fails[FAST] = RuntimeError('an illegal memory access was encountered')
    with pytest.raises(RuntimeError, match='illegal memory access'):
        run(tuner, device)


def test_timings_are_kept_on_disk(tmp_path, device):
    run(tuning.Tuner(tmp_path), device)
    device.timed.clear()
    device.may_time = False  # a distributed run reads what one GPU has timed
    again = tuning.Tuner(tmp_path)
    assert run(again, device) == FAST and not device.timed
    assert run(again, device, maker='another GPU') == SLOW
    assert run(again, device, configs=(SLOW, MIDDLE)) == SLOW  # no candidate any more


def test_timings_of_several_processes_add_up(tmp_path, device):
    first, second = tuning.Tuner(tmp_path), tuning.Tuner(tmp_path)
    for tuner in (first, second):
        tuner._fastest(device.launch, 'read the file', CONFIGS, 'a GPU')
    run(first, device, key='a')
    run(second, device, key='b')
    device.may_time = False
    third = tuning.Tuner(tmp_path)
    assert run(third, device, key='a') == run(third, device, key='b') == FAST
    assert [path.suffix for path in tmp_path.iterdir()] == ['.json']


@pytest.mark.parametrize(
    'content', ['', '{', '[]', '{"key": 3}', '{"key": ["a", 1]}', '{"key": [1, 2, 3]}', '\0\xff']
)
def test_an_unreadable_file_is_ignored(tuner, device, tmp_path, content):
    tuner.path('a GPU').write_bytes(content.encode('latin1'))
    assert run(tuner, device) == FAST
    device.may_time = False
    assert run(tuning.Tuner(tmp_path), device) == FAST  # and written anew


def test_a_folder_that_cannot_be_written(tmp_path, device):
    (tmp_path / 'file').touch()
    tuner = tuning.Tuner(tmp_path / 'file' / 'folder')
    assert run(tuner, device) == FAST
    device.timed.clear()
    assert run(tuner, device) == FAST and not device.timed


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, device, monkeypatch):
    tuner = tuning.Tuner(tmp_path)
    run(tuner, device)
    before = tuner.path('a GPU').read_text()

    def fail(*args):
        raise OSError('no space left on device')

    monkeypatch.setattr(os, 'replace', fail)
    run(tuner, device, key='another key')
    assert tuner.path('a GPU').read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_timed_in_a_distributed_run(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, is_current_stream_capturing=lambda: False)
    monkeypatch.setattr(torch, 'cuda', cuda)
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    monkeypatch.delenv('MMLITE_AUTOTUNE', raising=False)
    assert tuning._may_time()
    monkeypatch.setenv('WORLD_SIZE', '8')
    assert not tuning._may_time()
    monkeypatch.setenv('WORLD_SIZE', '1')
    assert tuning._may_time()
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    assert not tuning._may_time()
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 1)
    assert tuning._may_time()
    cuda.is_current_stream_capturing = lambda: True
    assert not tuning._may_time()
    cuda.is_current_stream_capturing = lambda: False
    monkeypatch.setenv('MMLITE_AUTOTUNE', '0')
    assert not tuning._may_time()


def test_multi_scale_training_falls_into_two_classes_of_work():
    """Images of MMDetection's multi-scale training, shorter side 480 to 800, at most 1333."""
    levels = [
        [-(-h // s) * -(-w // s) for s in (8, 16, 32, 64)]
        for h in range(480, 801, 32)
        for w in range(h, 1334, 32)
    ]
    for low in (0, 1):  # all tokens, and the high-level ones
        classes = {tuning.work_class(8 * sum(sizes[low:])) for sizes in levels}
        assert len(classes) <= 2
    assert tuning.work_class(0) == tuning.work_class(1)
    assert tuning.work_class(2**30) > tuning.work_class(2**15)


@pytest.mark.parametrize('points, dim', [(1, 8), (4, 32), (8, 64), (64, 64)])
def test_configurations_are_few_and_sound(points, dim):
    configs = tuning.candidates(points, dim)
    assert len(set(configs)) == len(configs) and len(configs) <= 6
    for config in configs:
        assert config.block_q >= 1 and config.block_q & (config.block_q - 1) == 0


def test_the_rule_knows_the_architecture():
    configs = tuning.candidates(4, 32)
    for kernel, capability, pairs, first in (
        ('forward', (8, 0), 10**5, (16, 4, False)),
        ('forward', (9, 0), 8 * 300, (16, 4, True)),  # few queries: latency counts
        ('backward', (9, 0), 8 * 300, (16, 4, False)),
        ('backward', (8, 0), 10**5, (8, 1, False)),
    ):
        ordered = tuning.by_rule(configs, kernel, capability, pairs)
        assert ordered[0] == first and set(configs) <= set(ordered)
        assert any(config.ahead for config in ordered) == (kernel == 'forward')
        assert len(set(ordered)) == len(ordered) <= 8
    assert tuning.by_rule(configs[:1], 'backward', (8, 0), 1) == configs[:1]


def test_timings_remember_what_is_loaded_ahead(tmp_path, device):
    ahead = SLOW._replace(ahead=True)
    device.times[ahead] = 0.5
    configs = (*CONFIGS, ahead)
    assert run(tuning.Tuner(tmp_path), device, configs=configs) == ahead
    device.may_time = False
    assert run(tuning.Tuner(tmp_path), device, configs=configs) == ahead


def test_the_operators_are_tuned(monkeypatch):
    """What the operators ask the tuner for, on tensors that pretend to be on a GPU."""
    asked = []
    problem = backend._Problem(1, 10, 100, 8, 1, 4, 32, (2, 5))
    tensor = SimpleNamespace(
        is_cuda=True, dtype=torch.float16, get_device=lambda: 0, device='cuda:0'
    )
    monkeypatch.setattr(torch.cuda, 'device_of', lambda tensor: torch.no_grad())
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0))
    monkeypatch.setattr(backend, 'maker', lambda index: f'GPU {index}')
    monkeypatch.setattr(
        backend, 'TUNER', SimpleNamespace(run=lambda launch, *rest: asked.append(rest))
    )
    backend._run_tuned('backward', None, problem, [tensor, None])
    ((key, configs, maker),) = asked
    assert key == 'backward torch.float16 None 1 4 32 3'
    assert configs[0] == (8, 1, False) and maker == 'GPU 0'
