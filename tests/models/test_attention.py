import copy
import functools
import pickle

import other_repositories as others
import pytest
import torch
from other_repositories import assert_same
from torch import nn

import mmlite
from mmlite.models import Fused

RAN = []  # what hooks and decorators of the tests have seen


@pytest.fixture
def compiled(monkeypatch):
    """The compiled operator runs."""
    monkeypatch.setattr(others.MSDeformAttnFunction, 'runs', True)


def run(model: nn.Module) -> tuple[list, dict]:
    """What a model gives, and the gradients of its parameters."""
    found = model(*others.inputs(model))
    model.zero_grad()
    sum(output.square().mean() for output in found).backward()
    return [*found], {name: p.grad.clone() for name, p in model.named_parameters()}


def test_points_of_one_level_serve_all(compiled):
    attention = others.MSDeformAttn().eval()
    sizes = torch.tensor(others.SIZES)
    tokens = torch.randn(1, int(sizes.prod(1).sum()), others.DIMS)
    points = torch.rand(1, tokens.shape[1], 1, 2)
    expected = attention(tokens, points, tokens, sizes, None)
    torch.testing.assert_close(
        mmlite.fuse(attention)(tokens, points, tokens, sizes, None), expected
    )


def note(module: nn.Module, *args) -> None:
    RAN.append(type(module))


@pytest.mark.parametrize('kind', others.KINDS)
def test_same_numbers_names_and_the_way_back(kind, compiled):
    model = others.build(kind)
    model.cross_attn.value_proj.register_forward_hook(note)
    kinds, names, state = (
        [*map(type, model.modules())],
        [*model.state_dict()],
        torch.get_rng_state(),
    )
    before, expected = run(model)
    RAN.clear()
    assert mmlite.fuse(model) is model
    assert not RAN and torch.equal(torch.get_rng_state(), state)
    assert sum(isinstance(part, Fused) for part in model.modules()) == 5
    for each in (model, copy.deepcopy(model), mmlite.fuse(pickle.loads(pickle.dumps(model)))):
        after, actual = run(each)
        assert_same(after, before)
        assert_same(actual.values(), expected.values())
        assert [*each.state_dict()] == names and RAN.pop() is nn.Linear
    torch.manual_seed(2)
    fused, _ = run(model.train())
    mmlite.restore(model)
    assert [*map(type, model.modules())] == kinds
    torch.manual_seed(2)
    assert_same(fused, run(model)[0])
    assert all(map(torch.equal, run(model.eval())[0], before))


def noted(forward):
    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        RAN.append('decorator')
        return forward(self, *args, **kwargs)

    return call


class Decorated(others.MSDeformAttn):
    forward = noted(others.MSDeformAttn.forward)


@pytest.mark.parametrize('kind', ['original', 'dino', 'by_name'])
def test_float64_with_reference_points_in_float32(kind, compiled):
    model = others.build(kind).double()
    src, pos, *rest = others.inputs(model)
    given = src.double(), pos.double(), *rest
    expected = model(*given)
    with torch.inference_mode():
        assert_same(mmlite.fuse(model)(*given), expected)
        mmlite.to_lite(model, 'H3L1-(1+1)x4', key_aware=False, small_ffn=False)
        assert_same(model(*given), expected)


class OneMore(others.MultiScaleDeformableAttention):
    """Knows one argument more."""

    def forward(self, query, key=None, value=None, identity=None, is_zero=None, **kwargs):
        query = query if is_zero is None else query * 0
        return super().forward(query, key, value, identity, **kwargs)


sample = others.ms_deform_attn_core_pytorch


class OwnSampler(others.MSDeformAttn):
    """Standard attention by a function of another name."""

    factor = 1

    def forward(self, query, reference_points, value, spatial_shapes, key_padding_mask=None):
        given = query, value, reference_points, spatial_shapes, key_padding_mask
        value, *points = self.inputs(*given)
        return self.factor * self.output_proj(sample(value, spatial_shapes, *points))


class InTraining(OwnSampler):
    def forward(self, query, reference_points, value, spatial_shapes, key_padding_mask=None):
        given = query, reference_points, value, spatial_shapes, key_padding_mask
        return super().forward(*given) * (1 + self.training)


class Sharper(OwnSampler):
    """Not to be seen with the weights it starts with."""

    def __init__(self):
        super().__init__()
        for layer in (self.attention_weights, self.output_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def weigh(self, logits):
        return (2 * logits).softmax(-1)


class Detached(OwnSampler):
    """Another derivative."""

    def weigh(self, logits):
        return logits.detach().softmax(-1)


class Nearest(OwnSampler):
    def forward(self, *args):
        return super().forward(*args)


class Needs(OwnSampler):
    def forward(self, query, reference_points, value, spatial_shapes, scale):
        return super().forward(query, reference_points, value, spatial_shapes) * scale


def call(attention: nn.Module, **more) -> torch.Tensor:
    torch.manual_seed(3)
    shapes = torch.tensor(others.SIZES)
    query, value = (
        torch.rand(2, 5, others.DIMS),
        torch.rand(2, int(shapes.prod(1).sum()), others.DIMS),
    )
    given = dict(query=query, value=value, reference_points=torch.rand(2, 5, 4, 2))
    return attention(**given, spatial_shapes=shapes, **more)


def test_decorators_stay(compiled):
    model = others.build(attention=Decorated)
    before, _ = run(model)
    mmlite.fuse(model)
    RAN.clear()
    assert_same(run(model)[0], before)
    assert RAN == ['decorator'] * 5


def test_structure_is_enough():
    attention = nn.Sequential(OwnSampler())[0]
    before = call(attention)
    assert_same([call(mmlite.fuse(attention))], [before])


def test_an_argument_more_goes_to_their_code():
    attention = OneMore().eval()
    expected = call(attention), call(attention, is_zero=True)
    mmlite.fuse(attention)
    assert_same([call(attention), call(attention, is_zero=True)], expected)
    assert not torch.equal(*expected)


def replaced() -> nn.Module:
    attention = OwnSampler()
    attention.forward = functools.partial(OwnSampler.forward, attention)
    return attention


def twice() -> nn.Module:
    attention = OwnSampler()
    attention.factor = 2
    return attention


@pytest.mark.parametrize(
    'build, sentence',
    [
        (
            others.MSDeformAttn,
            r'tried \(RuntimeError: Not implemented on the CPU\); import mmlite.st',
        ),
        (others.SigmoidAttn, 'it computes something else than multi-scale deformable attention'),
        (others.SwappedAttn, 'it computes something else than'),
        (replaced, 'its forward was replaced in this instance alone'),
        (twice, 'it computes something else than multi-scale deformable attention'),
        (Sharper, 'it computes something else than'),
        (Detached, 'it computes something else than'),
        (InTraining, 'it has more parts than deformable attention, or is another in training'),
        (Nearest, 'its forward does not name what it takes'),
        (Needs, r'it could not be tried \(TypeError'),
        (
            nn.Identity,
            'Identity has no deformable attention .* no module of it has',
        ),
    ],
)
def test_what_is_left_as_it_is(build, sentence, caplog, monkeypatch):
    monkeypatch.setattr(others.MSDeformAttnFunction, 'runs', build is not others.MSDeformAttn)
    left = build()
    with pytest.raises(ValueError, match=sentence):
        mmlite.fuse(left)
    model = nn.ModuleDict({'left': left, 'served': OwnSampler()})
    mmlite.fuse(model)
    assert type(model.left) is type(left) and isinstance(model.served, Fused)
    assert build is nn.Identity or 'left as it is: left: it' in caplog.text


def test_another_default_device_is_no_matter(compiled):
    model = others.build()
    with torch.device('meta'):
        mmlite.fuse(model)
    assert isinstance(model.cross_attn, Fused)
