import pytest
import torch

from mmlite.nn import EncoderSchedule
from mmlite.nn.schedule import level_ranks


@pytest.mark.parametrize(
    ('text', 'fields'),
    [
        ('H3L1-(2+1)x3', (3, 1, 2, 3)),
        ('H2L2-(2+1)x3', (2, 2, 2, 3)),
        ('H3L1-(6+1)x1', (3, 1, 6, 1)),
        ('h4l1 - ( 3+1 ) X 2', (4, 1, 3, 2)),
    ],
)
def test_parse_and_str(text, fields):
    schedule = EncoderSchedule.parse(text)
    assert schedule == EncoderSchedule(*fields)
    assert str(schedule) == 'H{}L{}-({}+1)x{}'.format(*fields)
    assert EncoderSchedule.parse(schedule) is schedule
    assert schedule.num_levels == fields[0] + fields[1]
    assert schedule.num_layers == fields[2] * fields[3]


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        *((text, 'not of the form HxLy') for text in ('', 'H3L1', 'H3L1-(2+2)x3', 3, None)),
        ('H3L1-(2+1)x3 x', 'not of the form HxLy-\\(A\\+1\\)xB, for example'),
        *((text, 'needs at least one') for text in ('H0L1-(2+1)x3', 'H3L0-(2+1)x3')),
        *((f'H3L1-{text}', 'needs at least one') for text in ('(0+1)x3', '(2+1)x0')),
        ('H3L0-1:1x3', 'must update each of its 3 maps'),
        ('H3L0-12x3+4', 'layer 4 .* some of the 3 maps'),
        ('H3L0-11+123', 'layer 1 .* each named once'),
        ('H3L0-123:5', 'layer 1 '),
        *((f'H3L0-{text}', 'not of the form') for text in ('123x0', '')),
    ],
)
def test_malformed(text, problem):
    with pytest.raises(ValueError, match=problem):
        EncoderSchedule.parse(text)


def test_of_maps_of_one_size_the_later_count_as_smaller():
    assert level_ranks([(2, 3), (1, 1), (3, 2), (6, 1)]) == (3, 0, 2, 1)


@pytest.mark.parametrize('dtype', [torch.int64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('update', ['joint', 'sequential'])
def test_code_is_exact(update, dtype):
    schedule = EncoderSchedule.parse('H2L2-(6+1)x1')
    code = schedule.encode(update).to(dtype)
    assert EncoderSchedule.decode(code) == (schedule, update)
    if dtype.is_floating_point:  # an average that is a little off
        assert EncoderSchedule.decode(code - 0.01) == (schedule, update)


@pytest.mark.parametrize(
    'numbers',
    [
        (3, 1, 2, 3),
        (3, 1, 2, 3, -1),
        (3, 1, 2, 3, 2),
        (3, 1, 2, 3, 0, 1),
        (3, 1, 0, 0, 0, 15, 15, 7),
        (3, 1, 0, 0, 0, 15, -1),
        (3, 1, 0, 0, 0, 31, 15),
        (3, 1, 2, 3, 0, 15, 15),
        (3, 1, 2, 3, 0, -1, 2, 2, 2, 3, 0),
        (float('nan'),) * 5,
    ],
)
def test_what_is_no_code_is_refused(numbers):
    with pytest.raises(ValueError, match='is the code of no schedule'):
        EncoderSchedule.decode(torch.tensor(numbers))
