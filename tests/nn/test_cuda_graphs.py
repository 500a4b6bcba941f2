"""Graph replay, with graphs that are made up: no device runs here."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from mmlite.nn import GraphReplay, LiteEncoder, cuda_graphs

THIN = dict(embed_dims=32, num_heads=4, feedforward_channels=64)
SIZES = [(8, 12), (4, 6), (2, 3), (1, 2)]


class Counting(nn.Module):
    """Notes how often it really runs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x, scale=1, y=None):
        self.calls += 1
        return x * self.weight * scale + (0 if y is None else y)


class Device:
    """Graphs of this device run their function again, on the tensors they hold."""

    def __init__(self, monkeypatch):
        self.captured = self.replayed = 0
        self.fails = None
        monkeypatch.setattr(cuda_graphs, '_on_gpu', lambda tensor: True)
        monkeypatch.setattr(cuda_graphs, '_is_capturing', lambda: False)
        monkeypatch.setattr(cuda_graphs, '_capture', self.capture)

    def capture(self, function, device, pool):
        if self.fails:
            raise self.fails
        self.captured += 1
        output = function().clone()

        def replay():
            self.replayed += 1
            output.copy_(function())

        return replay, output, pool


@pytest.fixture
def device(monkeypatch):
    with torch.no_grad():
        yield Device(monkeypatch)


@pytest.fixture
def module():
    return Counting().eval()


@pytest.fixture
def replay(module):
    return GraphReplay(module.forward, module)


def test_second_call_of_a_size_captures_and_later_ones_replay(device, module, replay):
    outputs = []
    for number in range(4):
        outputs.append(replay(torch.full((3,), float(number))))
        assert (device.captured, device.replayed) == [(0, 0), (1, 1), (1, 2), (1, 3)][number]
    for number, output in enumerate(outputs):  # none was overwritten by a later call
        assert output.tolist() == [2.0 * number] * 3


def test_another_size_or_argument_has_a_graph_of_its_own(device, replay):
    x = torch.ones(3)
    for call in (
        lambda: replay(x),
        lambda: replay(torch.ones(4)),
        lambda: replay(x.double()),
        lambda: replay(x, 3),
        lambda: replay(x, 1, x),
        lambda: replay(x, (5.0)),
    ):
        before = device.captured
        expected = call()
        assert device.captured == before
        assert torch.equal(call(), expected) and torch.equal(call(), expected)
        assert device.captured == before + 1


def test_weights_may_change_in_place_and_be_replaced(device, module, replay):
    x = torch.ones(3)
    for _ in range(3):
        replay(x)
    module.weight.data.fill_(5)
    assert replay(x).tolist() == [5.0] * 3 and device.captured == 1
    module.weight.data = torch.tensor(7.0)
    for _ in range(3):
        assert replay(x).tolist() == [7.0] * 3
    assert device.captured == 2


def test_the_size_not_used_for_longest_makes_room(device, module):
    replay = GraphReplay(module.forward, module, max_graphs=2)
    small, middle, large = (torch.ones(n) for n in (1, 2, 3))
    for x in (small, small, middle, middle, small, large, large):
        replay(x)
    assert device.captured == 3
    replay(small)
    assert device.captured == 3
    replay(middle)
    replay(middle)
    assert device.captured == 4


def test_what_runs_without_a_graph(device, module, replay, monkeypatch):
    x = torch.ones(3)
    call = GraphReplay(lambda x, f: f(x), module)  # a function among the arguments
    compiled = torch.compile(lambda x: replay(x), backend='eager', fullgraph=True)
    for _ in range(3):
        module.train()
        replay(x)
        module.eval()
        with torch.enable_grad():
            assert replay(x).requires_grad
        assert call(x, torch.neg).tolist() == [-1.0] * 3
        assert compiled(x).tolist() == [2.0] * 3
    monkeypatch.setattr(cuda_graphs, '_on_gpu', lambda tensor: tensor.is_cuda)
    for _ in range(3):
        replay(x)
    assert device.captured == 0


def test_a_capture_that_fails_is_not_tried_again(device, replay):
    x = torch.ones(3)
    replay(x)
    device.fails = RuntimeError('operation not permitted when stream is capturing\nmore')
    with pytest.warns(UserWarning, match='without a CUDA graph: operation not permitted') as seen:
        for _ in range(3):
            assert replay(x).tolist() == [2.0] * 3
    assert len(seen) == 1


def test_autocast_is_part_of_what_a_graph_is_for(device, replay, monkeypatch):
    x = torch.ones(3)
    for _ in range(3):
        replay(x)
    monkeypatch.setattr(cuda_graphs, 'autocast_dtype', lambda device_type: torch.bfloat16)
    for _ in range(3):
        replay(x)
    assert device.captured == 2


def test_inference_mode(device, replay):
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                assert replay(torch.ones(3)).tolist() == [2.0] * 3
    assert device.captured == 1


def encoder_inputs(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(h * w for h, w in sizes)
    x, pos = (torch.randn(2, tokens, 32, generator=generator) for _ in range(2))
    return {'tokens': x, 'pos': pos, 'level_sizes': sizes}


def test_the_encoder_replays_and_falls_back(device):
    encoder = LiteEncoder('H3L1-(2+1)x1', **THIN).eval()
    plain = copy.deepcopy(encoder)
    encoder.replay_graphs()
    other = [(4, 4), (2, 2), (1, 1), (1, 1)]
    for seed in range(4):
        for inputs in (encoder_inputs(seed=seed), encoder_inputs(other, seed)):
            torch.testing.assert_close(encoder(**inputs), plain(**inputs), rtol=0, atol=0)
    assert (device.captured, device.replayed) == (2, 6)
    mask = torch.zeros(2, 128, dtype=torch.bool)
    mask[:, -2:] = True
    for _ in range(3):
        inputs = {**encoder_inputs(), 'padding_mask': mask}
        torch.testing.assert_close(encoder(**inputs), plain(**inputs), rtol=0, atol=0)
    assert device.captured == 3
    inputs = encoder_inputs()
    encoder(**inputs, before_layer=lambda index, memory, tokens: memory)
    assert device.replayed == 8
    encoder.replay_graphs(False)
    encoder(**inputs)
    assert device.replayed == 8


def test_copies_and_pickles_hold_no_graphs(device):
    encoder = LiteEncoder('H3L1-(2+1)x1', **THIN).eval()
    names = list(encoder.state_dict())
    encoder.replay_graphs(max_graphs=3)
    assert list(encoder.state_dict()) == names
    inputs = encoder_inputs()
    for _ in range(2):
        expected = encoder(**inputs)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert not other._replay._graphs and other._replay.max_graphs == 3
        assert other._replay.module is other
        captured = device.captured
        for parameter in other.parameters():
            parameter.zero_()
        for _ in range(2):
            assert not torch.equal(other(**inputs), expected)
        assert device.captured == captured + 1
