"""Schedules that name their layers, and several schedules for one set of weights."""

import pytest
import torch
from thin_encoder import SIZES, THIN, inputs, randomised

from mmlite.models import use_schedule
from mmlite.nn import EncoderSchedule, EncoderStep, LiteEncoder
from mmlite.nn.schedule import decode_schedules, encode_schedules, layer_steps
from mmlite.nn.tokens import StepTokens

PRO_SCALE = 'H4L0-12:12x2+123:123+1234x2'


@pytest.mark.parametrize(
    ('text', 'name', 'layers'),
    [
        ('H3L0-1:1x3+12:12x3+123x3', 'H3L0-1:1x3+12:12x3+123x3', 9),
        ('h3l1-123 + 1234:4321 + 123+1234', 'H3L1-(2+1)x2', 4),
        ('H3L1-123x2+4:34', 'H3L1-123x2+4:34', 3),
        ('H4L0-1234+1234', 'H4L0-1234x2', 2),
    ],
)
def test_names(text, name, layers):
    schedule = EncoderSchedule.parse(text)
    assert str(schedule) == name and schedule.num_layers == layers
    assert EncoderSchedule.parse(name) == schedule
    for cast in (torch.Tensor.half, torch.Tensor.bfloat16):
        assert EncoderSchedule.decode(cast(schedule.encode())) == (schedule, 'joint')


def test_fit_to_an_encoder():
    with pytest.raises(
        ValueError, match=r'makes 5 layers, but num_layers is 6; name .*num_layers=5'
    ):
        EncoderSchedule.parse(PRO_SCALE).check_fit(6, 4)
    EncoderSchedule.parse(PRO_SCALE).check_fit(5, 4)


@pytest.mark.parametrize('options', [{}, {'key_aware': False}, {'same_loc': True}])
def test_named_layers_are_the_paper_s(options):
    """Spelt out layer by layer, a schedule of the paper computes the same."""
    paper = randomised(LiteEncoder('H3L1-(2+1)x2', **THIN, **options))
    schedule = EncoderSchedule.parse('H3L1-123+1234:1234+123+1234')
    assert schedule == paper.schedule
    steps = [EncoderStep(True, False, (0, 1, 2))] * 3 + [EncoderStep(True, True, (0, 1, 2, 3))]
    named = EncoderSchedule(3, 1, 0, 0, tuple(steps))
    three = randomised(LiteEncoder(named, **THIN, **options))
    one = randomised(LiteEncoder('H3L1-(4+1)x1', **THIN, **options))
    arguments = inputs()
    assert torch.equal(three(**arguments), one(**arguments))


@pytest.mark.parametrize('key_aware', [True, False])
@pytest.mark.parametrize('order', [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_a_layer_reads_only_what_its_schedule_says(key_aware, order):
    sizes = [SIZES[level] for level in order]
    encoder = randomised(LiteEncoder('H4L0-12:12+1234', **THIN, key_aware=key_aware))
    arguments = {**inputs(sizes), 'padding_mask': None}
    first = []
    encoder.layers[0].register_forward_hook(lambda module, args, output: first.append(output))
    encoder(**arguments)
    starts = torch.tensor([0, *(h * w for h, w in sizes)]).cumsum(0)
    small = [level for level, (h, _) in enumerate(sizes) if h <= 2]
    unread = torch.ones(arguments['tokens'].shape[1], dtype=torch.bool)
    for level in small:
        unread[starts[level] : starts[level + 1]] = False
    changed = arguments['tokens'].clone()
    changed[:, unread] += 1
    encoder(**{**arguments, 'tokens': changed})
    assert torch.equal(first[0][:, ~unread], first[1][:, ~unread])
    assert torch.equal(first[1][:, unread], changed[:, unread])
    # The attention over the two maps alone, with the rows of its layers that belong to them.
    attention = encoder.layers[0].self_attn
    small_sizes = [sizes[level] for level in small]
    tokens, pos = (arguments[name][:, ~unread] for name in ('tokens', 'pos'))
    points = torch.rand(1, tokens.shape[1], 2, 2)
    found = attention(
        tokens, query_pos=pos, reference_points=points, spatial_shapes=small_sizes, levels=small
    )
    value = torch.zeros_like(arguments['tokens'])
    value[:, ~unread] = tokens
    every = torch.zeros(1, tokens.shape[1], 4, 2)
    every[:, :, small] = points
    where = attention.locate(tokens + pos, points, small_sizes, small)
    expected = attention.locate(tokens + pos, every, sizes)[:, :, :, small]
    torch.testing.assert_close(where, expected)
    logits = attention.logits(tokens + pos, tokens, None, points, small_sizes, small)
    whole = attention.logits(tokens + pos, value, None, every, sizes).unflatten(-1, (4, -1))
    torch.testing.assert_close(logits, whole[..., small, :].flatten(-2))
    assert found.shape == tokens.shape


ELASTIC = ['H3L1-(1+1)x4', 'H3L1-(2+1)x2', 'H2L2-(4+1)x1']


def test_all_encoders_of_a_model_change_or_none():
    both = torch.nn.ModuleList([LiteEncoder(ELASTIC[0], **THIN, elastic=ELASTIC[1:])])
    both.append(LiteEncoder(ELASTIC[0], **THIN))
    with pytest.raises(ValueError, match='has no trained weights here'):
        use_schedule(both, ELASTIC[1])
    assert [str(encoder.schedule) for encoder in both] == ELASTIC[:1] * 2
    assert str(use_schedule(both[:1], ELASTIC[1])[0].schedule) == ELASTIC[1]


@pytest.mark.parametrize('order', [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_tokens_are_recalibrated_by_the_largest_map(order):
    """As PRO-SCALE writes it: the map is resized, then scored, for each smaller map alike."""
    sizes = [SIZES[level] for level in order]
    options = {**THIN, 'recalibrate': True}
    encoder = randomised(LiteEncoder('H4L0-1:1+12:12+123:123+1234', **options))
    plain = LiteEncoder('H4L0-1:1+12:12+123:123+1234', **THIN)
    plain.load_state_dict(encoder.state_dict(), strict=False)
    arguments = inputs(sizes)
    levels = list(arguments['tokens'].split([h * w for h, w in sizes], 1))
    largest = max(range(4), key=lambda level: sizes[level][0] * sizes[level][1])
    image = levels[largest].transpose(1, 2).unflatten(2, sizes[largest])
    for level, size in enumerate(sizes):
        if level != largest:
            resized = torch.nn.functional.interpolate(image, size, mode='bilinear')
            score = encoder.recalibration.score(resized.flatten(2).transpose(1, 2))
            levels[level] = levels[level] * torch.sigmoid(0.1 * score)
    expected = plain(**{**arguments, 'tokens': torch.cat(levels, 1)})
    torch.testing.assert_close(encoder(**arguments), expected)
    assert not torch.allclose(plain(**arguments), expected, atol=1e-3)
    compiled = torch.compile(encoder, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), expected)
    encoder(**arguments).sum().backward()
    assert all(p.grad is not None for p in encoder.recalibration.parameters())


def test_one_set_of_weights_serves_several_schedules():
    elastic = randomised(LiteEncoder(ELASTIC[0], **THIN, elastic=ELASTIC[1:])).eval()
    for name in reversed(ELASTIC):
        single = LiteEncoder(name, **THIN).eval()
        single.load_state_dict(elastic.state_dict(), strict=False)
        elastic.use_schedule(name)
        assert torch.equal(elastic(**inputs()), single(**inputs()))
    with pytest.raises(ValueError, match=r'H2L2-\(2\+1\)x2 has no trained weights here'):
        elastic.use_schedule('H2L2-(2+1)x2')
    with pytest.raises(ValueError, match=r'trained with schedule H3L1-\(1\+1\)x4 and H3L1'):
        LiteEncoder('H2L2-(2+1)x2', **THIN).load_state_dict(elastic.state_dict(), strict=False)
    with pytest.raises(ValueError, match=r"schedule='H3L1-\(1\+1\)x4', elastic=\[\], update"):
        elastic.load_state_dict(LiteEncoder(ELASTIC[0], **THIN).state_dict(), strict=False)


def test_training_takes_the_schedules_in_turn_and_prediction_the_chosen_one():
    encoder = randomised(LiteEncoder(ELASTIC[1], **THIN, elastic=ELASTIC))
    expected = {}
    for name in ELASTIC:
        encoder.use_schedule(name)
        expected[name] = encoder.eval()(**inputs())
    encoder.use_schedule(ELASTIC[1])
    encoder.train()
    for name in (ELASTIC[0], ELASTIC[2], ELASTIC[1], ELASTIC[0]):
        assert str(encoder.next_schedule) == name
        assert torch.equal(encoder(**inputs()), expected[name])
    assert torch.equal(encoder.eval()(**inputs()), expected[ELASTIC[1]])


def test_those_between_take_turns():
    names = [ELASTIC[0], 'H3L1-123+1234x3', *ELASTIC[1:]]
    encoder = LiteEncoder(ELASTIC[2], **THIN, elastic=names).train()
    turns = []
    for encoder.training_calls in range(6):
        turns.append(str(encoder.next_schedule))
    assert turns == [names[0], names[3], names[1], names[0], names[3], names[2]]


def test_a_compiled_elastic_encoder_is_compiled_for_each_turn_once():
    encoder = randomised(LiteEncoder(ELASTIC[1], **THIN, elastic=ELASTIC)).train()
    expected = [encoder(**inputs()) for _ in range(3)]
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(encoder, backend=keep)
    for _ in range(3):
        for memory in expected:
            torch.testing.assert_close(compiled(**inputs()), memory)
    assert len(graphs) == 3


def test_what_a_schedule_costs():
    """In tokens of the smallest map, each map having four times those of the next smaller."""
    costs = {
        'H3L1-(2+1)x3': 3 * (1 + 4 + 16) + 3 * (1 + 4 + 16 + 64),
        'H2L2-(2+1)x1': (1 + 4) + (1 + 4 + 16 + 64),
        'H3L0-1:1x3+12+123': 3 * 1 + 5 + 21,
    }
    assert {name: EncoderSchedule.parse(name).cost for name in costs} == costs


def test_a_step_may_name_what_it_reads_alone():
    step = EncoderStep(True, True, reads=(0, 2))
    assert StepTokens(step, [(4, 4), (1, 1), (2, 2)], (2, 0, 1), 2).read == (0, 1)


def test_what_cannot_share_weights_is_refused():
    with pytest.raises(ValueError, match='one set of weights cannot serve'):
        LiteEncoder('H3L1-(2+1)x2', **THIN, elastic=['H3L1-(2+1)x3'])
    with pytest.raises(ValueError, match='one set of weights cannot serve'):
        layer_steps([EncoderSchedule.parse(each) for each in ('H3L1-(2+1)x1', 'H2L1-(2+1)x1')])


def test_codes_of_several_schedules():
    schedules = [EncoderSchedule.parse(each) for each in (*ELASTIC, PRO_SCALE)]
    assert decode_schedules(encode_schedules(schedules, 'joint').half()) == (schedules, 'joint')
