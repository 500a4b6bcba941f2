import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from operator_cases import VARIANTS, Case
from torch import Tensor
from torch.autograd import forward_ad

from mmlite import ops
from mmlite.ops import cpu, functional

SHAPES = [(3, 4), (1, 2)]
B, Q, S, M, D, L, P = 2, 5, 14, 2, 8, 2, 3
BACKENDS = [
    pytest.param('cpu', marks=pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])),
    'reference',
]
each_backend = pytest.mark.parametrize('backend', BACKENDS)


def arguments_of(name: str) -> dict:
    """Fitting arguments of one of the four functions."""
    arguments = dict(value=torch.randn(B, S, M, D), spatial_shapes=torch.tensor(SHAPES))
    if name.startswith('ms_'):
        arguments['attention_weights'] = torch.rand(B, Q, M, L, P)
    else:
        arguments |= dict(query=torch.randn(B, Q, M, D), key=torch.randn(B, S, M, D))
    if name.endswith('_from_offsets'):
        offsets = torch.randn(B, Q, M, L, P, 2)
        return dict(arguments, reference_points=torch.rand(B, Q, L, 2), sampling_offsets=offsets)
    return dict(arguments, sampling_locations=torch.rand(B, Q, M, L, P, 2))


def meta(tensor: Tensor) -> Tensor:
    return tensor.to('meta')


def three(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[..., :1]], -1)


# An argument, what is wrong with it, and which argument the message begins with, if another one.
BAD = [
    ('value', lambda value: value[0]),
    ('value', Tensor.long),
    ('value', lambda value: value[:1], 'sampling_locations'),
    ('value', Tensor.double, 'sampling_locations'),
    ('sampling_locations', three),
    ('sampling_locations', lambda locations: locations[:, :, 0]),
    ('sampling_locations', lambda locations: locations[:, :, :1]),
    ('sampling_locations', lambda locations: locations[:, :, :, :, :0]),
    ('sampling_locations', Tensor.double),
    ('sampling_locations', meta),
    ('spatial_shapes', Tensor.float),
    ('spatial_shapes', meta),
    ('spatial_shapes', lambda shapes: shapes[0]),
    ('spatial_shapes', lambda shapes: [(3, 4, 1, 2)]),
    ('spatial_shapes', lambda shapes: shapes[:1]),
    ('spatial_shapes', lambda shapes: shapes + 1),
    ('spatial_shapes', lambda shapes: [(0, 5), (2, 7)]),
    ('spatial_shapes', lambda shapes: [(2, 7), (5, 0)]),
    ('spatial_shapes', lambda shapes: -shapes),
]
BAD_OFFSETS = [
    ('value', lambda value: value[:1], 'sampling_offsets'),
    ('sampling_offsets', lambda offsets: offsets[:, :, :, :, 0]),
    ('sampling_offsets', lambda offsets: torch.cat([offsets, offsets], 3)),
    ('sampling_offsets', Tensor.double),
    ('sampling_offsets', meta),
    ('reference_points', lambda points: points[:, :, 0]),
    ('reference_points', three),
    ('reference_points', lambda points: points[:, 1:]),
    ('reference_points', lambda points: torch.cat([points, points])),
    ('reference_points', lambda points: points[:, :, :1], 'spatial_shapes'),
    ('reference_points', Tensor.half),
    ('reference_points', meta),
    ('spatial_shapes', lambda shapes: shapes + 1),
]
BAD_KEY_AWARE = [
    ('query', lambda query: query[:, :, :1]),
    ('query', lambda query: query[..., :4]),
    ('query', Tensor.bfloat16),
    ('query', meta),
    ('key', lambda key: key[:, 1:]),
    ('key', Tensor.half),
]
BAD_STANDARD = [
    ('value', lambda value: value[:, 1:], 'spatial_shapes'),
    ('attention_weights', lambda weights: weights[..., :1]),
    ('attention_weights', Tensor.half),
    ('attention_weights', meta),
]


@pytest.mark.parametrize('choose', [nullcontext, partial(ops.use_backend, 'reference')])
@pytest.mark.parametrize(
    ('name', 'bad'),
    [
        *(('key_aware_deform_attn', bad) for bad in BAD + BAD_KEY_AWARE),
        *(('ms_deform_attn', bad) for bad in BAD + BAD_STANDARD),
        *(('key_aware_deform_attn_from_offsets', bad) for bad in BAD_OFFSETS + BAD_KEY_AWARE),
        *(('ms_deform_attn_from_offsets', bad) for bad in BAD_STANDARD),
    ],
)
def test_refuses(name, bad, choose):
    arguments, (changed, change, *blamed) = arguments_of(name), bad
    arguments[changed] = change(arguments[changed])
    with choose(), pytest.raises(ValueError) as raised:
        getattr(ops, name)(**arguments)
    message = str(raised.value)
    assert message.startswith((*blamed, changed)[0]) and '\n' not in message, message


def test_shapes_may_be_a_list_of_pairs():
    arguments = arguments_of('ms_deform_attn')
    expected = ops.ms_deform_attn(**arguments)
    for shapes in (SHAPES, torch.tensor(SHAPES, dtype=torch.int32)):
        assert torch.equal(ops.ms_deform_attn(**{**arguments, 'spatial_shapes': shapes}), expected)


def test_key_given_as_value_is_sampled_once(monkeypatch):
    arguments, sampled = arguments_of('key_aware_deform_attn'), []
    sample = functional.reference.sample
    monkeypatch.setattr(
        functional.reference, 'sample', lambda *args: sampled.append(args) or sample(*args)
    )
    with ops.use_backend('reference'):
        apart = ops.key_aware_deform_attn(**{**arguments, 'key': arguments['value'].clone()})
        assert len(sampled) == 2
        shared = ops.key_aware_deform_attn(**{**arguments, 'key': arguments['value']})
    assert len(sampled) == 3
    torch.testing.assert_close(shared, apart)


@each_backend
def test_autocast_rounds_features_but_not_locations(backend):
    arguments = arguments_of('key_aware_deform_attn')
    rounded = {
        name: tensor.bfloat16() if name in ('query', 'key', 'value') else tensor
        for name, tensor in arguments.items()
    }
    with ops.use_backend(backend):
        expected = ops.key_aware_deform_attn(**rounded)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            actual = ops.key_aware_deform_attn(**arguments)
            shared = ops.key_aware_deform_attn(**{**arguments, 'key': arguments['value']})
            double = ops.key_aware_deform_attn(
                **{n: t if t.dtype == torch.int64 else t.double() for n, t in arguments.items()}
            )
    assert actual.dtype == shared.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert torch.equal(actual, expected)


def test_backends_are_listed_with_their_reasons(monkeypatch):
    backends = {backend.name: backend for backend in ops.backends()}
    assert list(backends) == ['cpu', 'triton', 'reference']
    assert backends['reference'].available and all(each.detail for each in backends.values())
    monkeypatch.setattr(cpu, 'status', lambda: (False, 'no compiler'))
    for name, error, problem in (
        ('numpy', ValueError, r'backend must be one of .*reference.*numpy'),
        ('cpu', RuntimeError, 'cpu backend cannot run here: no compiler'),
    ):
        with pytest.raises(error, match=problem), ops.use_backend(name):
            pass


def test_without_kernels_the_reference_runs(monkeypatch):
    """What happens where the kernels could not be compiled."""
    arguments = arguments_of('ms_deform_attn')
    with ops.use_backend('reference'):
        expected = ops.ms_deform_attn(**arguments)
    monkeypatch.setattr(cpu, '_kernels', None)
    monkeypatch.setattr(cpu, '_why_not', 'not compiled')
    assert cpu.why_not(arguments['value'], L) == 'not compiled'
    assert ops.backends()[0] == ('cpu', False, 'not compiled')
    assert torch.equal(ops.ms_deform_attn(**arguments), expected)


@pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
def test_forced_backend_refuses_what_it_does_not_serve():
    value = torch.randn(1, 1, 1, 300)
    locations, weights = torch.rand(1, 1, 1, 1, 1, 2), torch.rand(1, 1, 1, 1, 1)
    with ops.use_backend('cpu'), pytest.raises(ValueError, match=r'cpu backend .* these have 300'):
        ops.ms_deform_attn(value, [(1, 1)], locations, weights)
    assert ops.ms_deform_attn(value, [(1, 1)], locations, weights).shape == (1, 1, 300)


def test_backend_is_forced_for_its_block_and_thread_alone():
    seen = []

    def look() -> None:
        seen.append(functional._choice.backend)
        with ops.use_backend('reference'):
            started.set()
            ended.wait(10)

    started, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=look)
    with pytest.raises(KeyError), ops.use_backend('reference'):
        with ops.use_backend('reference'):
            pass
        assert functional._choice.backend == 'reference'
        thread.start()
        started.wait(10)
        raise KeyError
    # The other thread is still inside its own block.
    assert functional._choice.backend is None
    ended.set()
    thread.join()
    assert seen == [None] and functional._choice.backend is None


@pytest.mark.skipif(torch.__version__ < (2, 6), reason='dynamo of torch 2.6 and later')
def test_compiled_graph_follows_the_forced_backend():
    torch.compiler.reset()
    arguments = arguments_of('ms_deform_attn')
    arguments['spatial_shapes'] = SHAPES
    compiled = torch.compile(ops.ms_deform_attn, fullgraph=True, backend='eager')
    expected = ops.ms_deform_attn(**arguments)
    torch.testing.assert_close(compiled(**arguments), expected)
    with ops.use_backend('reference'):
        assert torch.equal(compiled(**arguments), ops.ms_deform_attn(**arguments))
    torch.testing.assert_close(compiled(**arguments), expected)


@pytest.mark.parametrize('shared', [True, False])
def test_meta_tensors(shared):
    arguments = {
        name: tensor.to('meta')
        for name, tensor in arguments_of('key_aware_deform_attn').items()
        if name != 'spatial_shapes'
    }
    if shared:
        arguments['key'] = arguments['value']
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    output = ops.key_aware_deform_attn(**arguments, spatial_shapes=SHAPES)
    assert output.is_meta and output.shape == (B, Q, M * D)
    assert type(output.grad_fn).__name__ == '_AttentionBackward'  # no formulation's steps
    output.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in arguments.values())
    with pytest.raises(ValueError, match='spatial_shapes'):
        ops.key_aware_deform_attn(**arguments, spatial_shapes=[(3, 4)])


@pytest.fixture(params=[None, dict(), dict(boxes=True, shared=True), dict(batch=1)], ids=str)
def places(request):
    return request.param


@pytest.fixture(params=VARIANTS)
def case(request, places):
    # With 9 points, a head has more of them than one chunk of the CPU kernels.
    case = Case(request.param, ((3, 4), (1, 2)), 2, 2, 2, 3, 9, torch.float64, seed=3)
    return case if places is None else case.from_offsets(**places)


@each_backend
def test_every_gradient_reaches_its_own_argument(case, backend):
    leaves = [tensor.requires_grad_() for tensor in case.inputs.values()]
    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *t: case.call(dict(zip(case.inputs, t))), leaves)


@pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
def test_second_derivatives_and_forward_mode_are_refused(case):
    for name, tensor in case.inputs.items():
        first = tensor.requires_grad_()
        (grad,) = torch.autograd.grad(
            case.call(case.inputs).square().sum(), first, create_graph=True
        )
        with pytest.raises(RuntimeError, match='cannot be differentiated twice'):
            grad.sum().backward()
        dual = forward_ad.make_dual
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='jvp'):
            case.call({**case.inputs, name: dual(first.detach(), first.detach())})
