"""A student that follows a teacher: what is compared, what is trained, and that it comes closer."""

import copy

import pytest
import torch
from thin_encoder import THIN, inputs
from torch import nn

from mmlite.nn import EncoderSchedule, LiteEncoder
from mmlite.nn.distill import (
    EncoderOptimizer,
    Muon,
    compared_layers,
    distill,
    fed,
    keep_outputs,
    learning_rate,
    token_distance,
)

STOCK = dict(schedule='H4L0-1234x2', key_aware=False)


class Stock(nn.Module):
    """A stock encoder: its layers, and no schedule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = LiteEncoder(**STOCK, **THIN)
        self.layers = whole.layers
        self.__dict__['whole'] = whole

    def forward(self, **arguments):
        return self.whole(**arguments)


@pytest.mark.parametrize(
    ('schedule', 'update', 'expected'),
    [
        ('H3L1-(2+1)x3', 'joint', [(1, 1), (3, 3), (5, 5)]),
        ('H3L1-(2+1)x2', 'sequential', [(2, 1), (5, 3)]),
        ('H3L0-1:1x2+12:12x2+123x2', 'joint', [(4, 4), (5, 5)]),
        ('H3L1-123+1234+123', 'joint', [(1, 1), (2, 2)]),
    ],
)
def test_compared_layers(schedule, update, expected):
    schedule = EncoderSchedule.parse(schedule)
    encoder = LiteEncoder(schedule, **THIN, update=update)
    assert compared_layers(encoder) == expected


def test_token_distance_is_in_units_of_variance_and_leaves_padding_out():
    wanted = torch.randn(2, 50, 8) * 3 + 1
    padding = torch.zeros(2, 50, dtype=torch.bool)
    padding[1, 30:] = True
    real = wanted[~padding]
    found = wanted.clone()
    found[padding] = 1e6
    assert token_distance([found], [wanted], padding) == 0
    mean = real.mean(0).expand_as(wanted)
    expected = ((real - real.mean(0)) ** 2).mean() / real.var(0).mean()
    torch.testing.assert_close(token_distance([mean], [wanted], padding), expected)
    twice = token_distance([mean, found], [wanted, wanted], padding)
    torch.testing.assert_close(twice, expected / 2)


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(i, 100) for i in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[4] > 0.99
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 1e-3


def test_a_student_comes_closer_and_nothing_else_changes():
    teacher = nn.ModuleDict({'encoder': Stock(), 'other': nn.Linear(2, 2)})
    student = nn.ModuleDict({'encoder': LiteEncoder('H3L1-(2+1)x1', **THIN)})
    student['other'] = nn.Linear(2, 2)
    for model in (teacher, student):
        model.forward = lambda model=model, **arguments: model['encoder'](**arguments)
    before = copy.deepcopy(student['other'].state_dict())
    kept = copy.deepcopy(teacher.state_dict())
    losses = []
    distill(student, teacher, [inputs()], 40, report=lambda i, loss: losses.append(loss))
    assert len(losses) == 40 and losses[-1] < 0.7 * losses[0]
    assert not student.training
    for model, state in ((student['other'], before), (teacher, kept)):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_blocks_learn_alone_at_first_and_together_then():
    encoder, arguments = LiteEncoder('H3L1-(1+1)x2', **THIN), inputs()
    wanted = [torch.randn_like(arguments['tokens']) for _ in range(2)]
    for iteration, alone in ((0, True), (4, True), (5, False), (9, False)):
        encoder.zero_grad()
        with keep_outputs(encoder.layers, fed(wanted, iteration, 10)) as tokens:
            memory = encoder(**arguments)
        assert memory is tokens[-1]  # what leaves the encoder is its own
        token_distance(tokens[1:], wanted[1:]).backward()
        first = encoder.layers[0].self_attn.value_proj.weight.grad
        assert (first is None or not first.any()) == alone


def test_an_elastic_student_learns_every_schedule():
    schedules = ['H3L1-(1+1)x2', 'H2L2-(2+1)x1', 'H3L1-(2+1)x1']
    student = LiteEncoder(schedules[0], **THIN, elastic=schedules[1:])
    used = []
    student.register_forward_pre_hook(lambda m, _: used.append(str(m.next_schedule)))
    teacher, calls = Stock(), []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    distill(student, teacher, [inputs()], 2)
    assert used == [schedules[0], schedules[1], schedules[2]] * 2
    assert len(calls) == 2  # one of the teacher for all schedules of an update
    assert str(student.schedule) == schedules[0]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match='Linear has no Lite encoder to train'):
        distill(nn.Linear(2, 2), Stock(), [])
    student = LiteEncoder('H3L1-(2+1)x1', **THIN)
    with pytest.raises(ValueError, match='is no teacher'):
        distill(student, copy.deepcopy(student), [])
    with pytest.raises(ValueError, match='no batches'):
        distill(student, Stock(), [])


def test_an_optimizer_goes_on_where_it_was():
    def trained(steps: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        layer, kept = nn.Linear(4, 8), None
        for count in steps:
            optimizer = EncoderOptimizer([*layer.parameters(), nn.Parameter(torch.zeros(1), False)])
            if kept:
                optimizer.load_state_dict(kept)
            for _ in range(count):
                optimizer.zero_grad()
                layer(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
            kept = copy.deepcopy(optimizer.state_dict())
        return torch.cat([parameter.detach().flatten() for parameter in layer.parameters()])

    assert torch.equal(trained([6]), trained([2, 4]))


def test_the_optimizer_trains_every_parameter_and_follows_its_rate():
    layer = nn.Linear(4, 8)
    optimizer = EncoderOptimizer(layer.parameters(), lr=0.1, weight_decay=0.0)
    for rate in (0.1, 0.0):
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        for group in optimizer.param_groups:
            group['lr'] = rate
        optimizer.zero_grad()
        layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        moved = [not torch.equal(old, new) for old, new in zip(before, layer.parameters())]
        assert moved == [rate > 0] * 2


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='PyTorch before 2.9 has no Muon')
def test_muon_is_that_of_pytorch():
    """Matrices near square, tall and wide, and kernels of convolutions as matrices."""
    torch.manual_seed(0)
    ours = [torch.randn(*shape, requires_grad=True) for shape in ((8, 12), (24, 8), (8, 6, 2, 2))]
    theirs = [tensor.detach().flatten(1).clone().requires_grad_() for tensor in ours]
    muon = torch.optim.Muon(theirs, 0.1, 0.01, momentum=0.8, adjust_lr_fn='match_rms_adamw')
    start = [tensor.detach().clone() for tensor in theirs]
    for optimizer, tensors in ((Muon(ours, 0.1, 0.01, momentum=0.8), ours), (muon, theirs)):
        for _ in range(3):
            optimizer.zero_grad()
            sum(tensor.sin().sum() for tensor in tensors).backward()
            optimizer.step()
    for one, other, before in zip(ours, theirs, start):
        moved = (other - before).norm()  # theirs in bfloat16
        assert (one.flatten(1) - other).norm() < 0.02 * moved


def test_few_rows_are_not_for_muon():
    parts = EncoderOptimizer(nn.Linear(4, 4).parameters()).parts
    assert [type(part) for part in parts] == [torch.optim.AdamW]
    large, rest = EncoderOptimizer(nn.Linear(4, 8).parameters(), momentum=0.7).parts
    assert isinstance(large, Muon) and large.param_groups[0]['momentum'] == 0.7
    assert isinstance(rest, torch.optim.AdamW)
