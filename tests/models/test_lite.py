import copy
import pickle

import other_repositories as others
import pytest
import torch
from other_repositories import MSDeformAttnFunction, assert_same
from torch import nn

import mmlite
from mmlite.models.lite import AnyLiteEncoder
from mmlite.nn.distill import distill

SMALLEST_FIRST = dict(sizes=[(2, 3), (4, 3), (6, 8)])


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """The compiled operator runs."""
    monkeypatch.setattr(MSDeformAttnFunction, 'runs', True)


def run(model: nn.Module) -> list[torch.Tensor]:
    return [*model(*others.inputs(model))]


@pytest.mark.parametrize(
    'kind, options',
    [
        *((kind, {}) for kind in others.KINDS),
        ('original', SMALLEST_FIRST),
        ('original', dict(layer=dict(activation=torch.nn.functional.gelu))),
        ('original', dict(layer=dict(activation=nn.PReLU()))),
        ('dino', dict(norm=nn.LayerNorm(others.DIMS), enc_layer_dropout_prob=[0.0] * 4)),
        ('grounding', dict(use_checkpoint=True)),
        ('sequence_first', dict(post_norm_layer=nn.LayerNorm(others.DIMS))),
    ],
)
def test_every_level_in_every_layer_is_the_stock_model(kind, options):
    model = others.build(kind, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    before, names = run(model), [*model.state_dict()]
    levels = f'H{len(model.sizes) - 1}L1'
    assert mmlite.to_lite(model, f'{levels}-(1+1)x4', key_aware=False, small_ffn=False) is model
    assert_same(run(model), before)
    assert model.encoder.num_layers == 4 or kind in ('by_name', 'sequence_first')

    mmlite.to_lite(mmlite.restore(model), f'{levels}-(2+1)x2', update='sequential').train()
    sum(output.square().mean() for output in run(model)).backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None, name
    model.eval()
    expected = run(model)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert_same(run(each), expected)
        mmlite.restore(each)
        assert [*each.state_dict()] == names
        assert all(map(torch.equal, run(each), before))


@pytest.mark.parametrize('kind', ['original', 'sequence_first'])
def test_it_learns_from_the_stock_model(kind):
    model, losses = others.build(kind), []
    teacher = copy.deepcopy(model)
    mmlite.to_lite(model, 'H3L1-(2+1)x2')
    distill(model, teacher, [others.inputs(model)], 40, report=lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_low_level_maps_are_the_largest():
    for options, waits in (({}, 6 * 8), (SMALLEST_FIRST, 6 * 8)):
        model = mmlite.to_lite(others.build(**options), f'H{2 + (not options)}L1-(2+1)x2')
        runs = model.encoder.step_tokens(0, model.sizes).runs
        assert [run.stop - run.start for run in runs if not run.is_updated] == [waits]


def test_it_is_called_and_seen_as_the_stock_encoder():
    model = others.build('dino')
    seen = []
    model.other = model.encoder
    handle = model.encoder.register_forward_hook(lambda *each: seen.append(each))
    gradients = []
    model.encoder.register_full_backward_hook(lambda *each: gradients.append(each))
    mmlite.to_lite(model, 'H3L1-(2+1)x2', num_cp=1, elastic='H2L2-(2+1)x2')
    memory = run(model)[0]
    (module, _, output) = seen.pop()
    assert module is model.encoder is model.other
    assert torch.equal(output[0], memory) and output[1:] == (None, None)
    memory.sum().backward()
    assert gradients
    handle.remove()
    mmlite.use_schedule(model, 'H2L2-(2+1)x2')
    assert not torch.equal(run(model)[0], memory) and not seen
    given = [*others.inputs(model)[:3]]
    with pytest.raises(ValueError, match='does not know what to do with ref_token_index'):
        shapes = torch.tensor(others.SIZES)
        model.encoder(*given[:2], shapes, None, None, given[2], ref_token_index=given[2])
    with pytest.raises(ValueError, match='Model has a Lite encoder already'):
        mmlite.to_lite(model, 'H3L1-(2+1)x2')


def shared() -> nn.Module:
    model = others.build('dino')
    model.encoder.layers = nn.ModuleList([model.encoder.layers[0]] * 4)
    return model


def with_part(path: str, part: nn.Module, kind: str = 'dino') -> nn.Module:
    model = others.build(kind)
    model.encoder.get_submodule(path).more = part
    return model


def replaced() -> nn.Module:
    model = others.build('dino')
    model.encoder.layers[0].forward = lambda *args, **kwargs: args[0]
    return model


class Twice(others.DinoEncoder):
    @staticmethod
    def reference_points(shapes, ratios):
        return others.Encoder.reference_points(shapes, ratios) / 2


def compiled_alone() -> nn.Module:
    model = others.build()
    model.encoder = torch.compile(model.encoder, backend='eager')
    return model


class OtherLayer(others.Layer):
    def forward(self, *args):
        return super().forward(*args) * (2 if self.training else 1)


def with_layer() -> nn.Module:
    model = others.build()
    model.encoder.layers[3].__class__ = OtherLayer
    return model


class Scaled(others.Encoder):
    def forward(
        self, src, spatial_shapes, level_start_index, valid_ratios, pos=None, padding_mask=None,
        scale=1.0
    ):  # fmt: skip
        levels = spatial_shapes, level_start_index, valid_ratios
        return scale * super().forward(src, *levels, pos, padding_mask)


def test_an_argument_may_be_given_as_it_is_by_default():
    src, pos, mask, ratios, _ = others.inputs(model := of_class('original', Scaled))
    given = src, torch.tensor(others.SIZES), None, ratios, pos, mask
    expected = model.encoder(*given)
    mmlite.to_lite(model, 'H3L1-(1+1)x4', key_aware=False, small_ffn=False)
    assert_same([model.encoder(*given, 1.0)], [expected])
    with pytest.raises(ValueError, match='does not know what to do with scale'):
        model.encoder(*given, 2.0)


def test_what_was_frozen_stays_frozen():
    model = others.build().requires_grad_(False)
    mmlite.to_lite(model, 'H3L1-(2+1)x2')
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained and all('query_proj' in name or 'small_ffn.' in name for name in trained)


def test_a_model_on_the_meta_device():
    with torch.device('meta'):
        model = others.build()
    mmlite.to_lite(model, 'H3L1-(2+1)x2')
    assert {each.device.type for each in model.state_dict().values()} == {'meta'}
    state = mmlite.to_lite(others.build(), 'H3L1-(2+1)x2').state_dict()
    model.load_state_dict(state, assign=True)


def test_a_wrong_option_is_named():
    with pytest.raises(TypeError, match='keyaware'):
        mmlite.to_lite(others.build(), 'H3L1-(2+1)x2', keyaware=False)


class Trained(others.Encoder):
    def forward(self, *args, **kwargs):
        assert not self.training  # in training it computes something else
        return super().forward(*args, **kwargs)


def of_class(kind: str, encoder: type) -> nn.Module:
    model = others.build(kind)
    model.encoder.__class__ = encoder
    return model


@pytest.mark.parametrize(
    'build, sentence',
    [
        (lambda: others.build(attention=others.SigmoidAttn), 'encoder: it computes something else'),
        (lambda: others.build(attention=others.SwappedAttn), 'encoder: it computes something else'),
        (lambda: others.build('dino', enc_layer_dropout_prob=[0.0, 0.1, 0.1, 0.1]), 'at random'),
        (
            lambda: others.build('original', layer=dict(activation=torch.nn.functional.glu)),
            'its activation',
        ),
        (lambda: others.build('original', layer=dict(activation=nn.GLU())), 'could not be tried'),
        (lambda: others.build('original', layer=dict(activation=nn.Softmax(1))), 'something else'),
        (lambda: of_class('dino', Twice), 'encoder: it computes something else'),
        (lambda: of_class('original', Trained), 'computes something else in training'),
        (with_layer, 'computes something else in training'),
        (compiled_alone, 'torch.compile would go on calling it; compile after to_lite'),
        (shared, 'its layers share their weights'),
        (lambda: with_part('layers.1', nn.LayerNorm(4)), 'its parts layers.1.more have no'),
        (lambda: with_part('layers.1', nn.Dropout(0.1)), 'its parts layers.1.more have no'),
        (lambda: with_part('', nn.Linear(4, 4)), 'its parts more have no counterpart'),
        (replaced, 'was replaced in this instance alone'),
        (lambda: others.build('dino').encoder, 'the model: it is the model itself; give'),
        (lambda: others.build(sizes=others.SIZES[1:]), 'num_levels=3; use H2L1-'),
        (lambda: (others.build(), None), 'give a torch.nn.Module alone, not a tuple'),
        (lambda: nn.Linear(1, 1), 'Linear has no encoder .* none of its modules'),
    ],
)
def test_refusals(build, sentence):
    model = build()
    parts = nn.ModuleList(each for each in [model] if isinstance(each, nn.Module))
    before = [type(part) for part in parts.modules()]
    with pytest.raises(ValueError, match=sentence):
        mmlite.to_lite(model, 'H3L1-(2+1)x2')
    assert [type(part) for part in parts.modules()] == before


def test_an_operator_that_is_not_there_has_a_stand_in(monkeypatch):
    monkeypatch.setattr(MSDeformAttnFunction, 'runs', False)
    with pytest.raises(ValueError, match=r'import mmlite\.standins'):
        mmlite.to_lite(others.build(), 'H3L1-(2+1)x2')


def test_one_encoder_of_two(caplog):
    model = nn.ModuleDict({'a': others.build(), 'b': shared()})
    mmlite.to_lite(model, 'H3L1-(2+1)x2')
    assert isinstance(model.a.encoder, AnyLiteEncoder)
    assert isinstance(model.b.encoder, others.DinoEncoder)
    assert 'left as it is: b.encoder: its layers share' in caplog.text
