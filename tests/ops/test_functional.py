"""What the public operators refuse, and which backend they choose."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from mmlite import ops
from mmlite.ops import cpu, functional

SHAPES = [(3, 4), (1, 2)]
B, Q, S, M, D, L, P = 2, 5, 14, 2, 8, 2, 3


def kda_arguments() -> dict:
    return dict(
        query=torch.randn(B, Q, M, D),
        key=torch.randn(B, S, M, D),
        value=torch.randn(B, S, M, D),
        spatial_shapes=torch.tensor(SHAPES),
        sampling_locations=torch.rand(B, Q, M, L, P, 2),
    )


def offsets_in(arguments: dict) -> dict:
    """Offsets and reference points in place of the locations."""
    offsets = torch.randn(arguments.pop('sampling_locations').shape)
    return {**arguments, 'reference_points': torch.rand(B, Q, L, 2), 'sampling_offsets': offsets}


def msda_arguments() -> dict:
    arguments = kda_arguments()
    del arguments['query'], arguments['key']
    return {**arguments, 'attention_weights': torch.rand(B, Q, M, L, P)}


# Name of the argument that the message must begin with -> what is wrong with it.
BAD = {
    'value with three dimensions': ('value', lambda value: value[0]),
    'value of integers': ('value', lambda value: value.long()),
    'value of another batch': ('sampling_locations', lambda value: value[:1], 'value'),
    'locations with three numbers': (
        'sampling_locations',
        lambda locations: torch.cat([locations, locations[..., :1]], -1),
    ),
    'locations without heads': ('sampling_locations', lambda locations: locations[:, :, 0]),
    'locations of other heads': ('sampling_locations', lambda locations: locations[:, :, :1]),
    'locations of another dtype': ('sampling_locations', lambda locations: locations.double()),
    'locations of less than float64': ('sampling_locations', torch.Tensor.double, 'value'),
    'locations on another device': ('sampling_locations', lambda locations: locations.to('meta')),
    'no points': ('sampling_locations', lambda locations: locations[:, :, :, :, :0]),
    'shapes of floats': ('spatial_shapes', lambda shapes: shapes.float()),
    'shapes without pairs': ('spatial_shapes', lambda shapes: shapes[0]),
    'shapes of four sides': ('spatial_shapes', lambda shapes: [(3, 4, 1, 2)]),
    'shapes without values': ('spatial_shapes', lambda shapes: shapes.to('meta')),
    'shapes of one level': ('spatial_shapes', lambda shapes: shapes[:1]),
    'shapes of other sizes': ('spatial_shapes', lambda shapes: shapes + 1),
    'shapes of nothing': ('spatial_shapes', lambda shapes: [(0, 5), (2, 7)]),
    'shapes that are negative': ('spatial_shapes', lambda shapes: -shapes),
}
BAD_OFFSETS = {
    'value of another batch': ('sampling_offsets', lambda value: value[:1], 'value'),
    'offsets without points': ('sampling_offsets', lambda offsets: offsets[:, :, :, :, 0]),
    'offsets of other levels': (
        'sampling_offsets',
        lambda offsets: torch.cat([offsets, offsets], 3),
    ),
    'offsets of another dtype': ('sampling_offsets', lambda offsets: offsets.double()),
    'offsets on another device': ('sampling_offsets', lambda offsets: offsets.to('meta')),
    'reference points without levels': ('reference_points', lambda points: points[:, :, 0]),
    'reference points with three numbers': (
        'reference_points',
        lambda points: torch.cat([points, points[..., :1]], -1),
    ),
    'reference points of other queries': ('reference_points', lambda points: points[:, 1:]),
    'reference points of other images': (
        'reference_points',
        lambda points: torch.cat([points, points]),
    ),
    'reference points of other levels': (
        'spatial_shapes',
        lambda points: points[:, :, :1],
        'reference_points',
    ),
    'reference points of another dtype': ('reference_points', lambda points: points.half()),
    'reference points on another device': ('reference_points', lambda points: points.to('meta')),
    'shapes of other sizes': ('spatial_shapes', lambda shapes: shapes + 1),
}
BAD_KDA = {
    'query of other heads': ('query', lambda query: query[:, :, :1]),
    'query of another width': ('query', lambda query: query[..., :4]),
    'query of another dtype': ('query', lambda query: query.bfloat16()),
    'query on another device': ('query', lambda query: query.to('meta')),
    'key of other tokens': ('key', lambda key: key[:, 1:]),
    'key of another dtype': ('key', lambda key: key.half()),
}
BAD_MSDA = {
    'tokens missing': ('spatial_shapes', lambda value: value[:, 1:], 'value'),
    'weights of other points': ('attention_weights', lambda weights: weights[..., :1]),
    'weights of another dtype': ('attention_weights', lambda weights: weights.half()),
    'weights on another device': ('attention_weights', lambda weights: weights.to('meta')),
}


def check_refused(function, arguments, blamed, change, changed=None):
    changed = changed or blamed
    arguments[changed] = change(arguments[changed])
    with pytest.raises(ValueError) as raised:
        function(**arguments)
    message = str(raised.value)
    assert message.startswith(blamed), message
    assert '\n' not in message


@pytest.mark.parametrize('what', [*BAD, *BAD_KDA])
def test_key_aware_refuses(what):
    check_refused(ops.key_aware_deform_attn, kda_arguments(), *{**BAD, **BAD_KDA}[what])


@pytest.mark.parametrize('what', [*BAD, *BAD_MSDA])
def test_standard_refuses(what):
    check_refused(ops.ms_deform_attn, msda_arguments(), *{**BAD, **BAD_MSDA}[what])


@pytest.mark.parametrize('backend', ['cpu', 'reference'])
@pytest.mark.parametrize('what', [*BAD_OFFSETS, *BAD_KDA, *BAD_MSDA])
def test_from_offsets_refuses(what, backend):
    if backend == 'cpu' and not cpu.status()[0]:
        pytest.skip(cpu.status()[1])
    arguments, function = kda_arguments(), ops.key_aware_deform_attn_from_offsets
    if what in BAD_MSDA:
        arguments, function = msda_arguments(), ops.ms_deform_attn_from_offsets
    bad = {**BAD_OFFSETS, **BAD_KDA, **BAD_MSDA}[what]
    with ops.use_backend(backend):
        check_refused(function, offsets_in(arguments), *bad)


def test_shapes_may_be_a_list_of_pairs():
    arguments = msda_arguments()
    expected = ops.ms_deform_attn(**arguments)
    arguments['spatial_shapes'] = SHAPES
    assert torch.equal(ops.ms_deform_attn(**arguments), expected)
    arguments['spatial_shapes'] = torch.tensor(SHAPES, dtype=torch.int32)
    assert torch.equal(ops.ms_deform_attn(**arguments), expected)


class Pyramid(torch.nn.Module):
    """Both operators on maps whose sizes nobody says again."""

    def forward(self, maps, query, locations, weights):
        sizes = [level.shape[-2:] for level in maps]
        value = torch.cat([level.flatten(2) for level in maps], -1).mT.unflatten(-1, (M, D))
        key_aware = ops.key_aware_deform_attn(query, value, value, sizes, locations)
        return key_aware + ops.ms_deform_attn(value, sizes, locations, weights)


def pyramid_inputs(batch, queries, sizes):
    maps = [torch.randn(batch, M * D, *size, requires_grad=True) for size in sizes]
    query = torch.randn(batch, queries, M, D, requires_grad=True)
    locations = torch.rand(batch, queries, M, len(sizes), P, 2, requires_grad=True)
    return maps, query, locations, torch.rand(batch, queries, M, len(sizes), P)


DYNAMIC = ((3, 9, [(8, 5), (4, 3)]), (4, 6, [(5, 15), (2, 9)]))


@pytest.mark.skipif(torch.__version__ < (2, 6), reason='symbolic sizes of torch 2.6 and later')
def test_compile_with_dynamic_batch_and_sizes():
    torch.compiler.reset()
    module = Pyramid()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend='aot_eager')
    for sizes in ((2, 5, [(6, 7), (3, 4)]), *DYNAMIC):
        inputs = pyramid_inputs(*sizes)
        wanted, actual = module(*inputs), compiled(*inputs)
        assert torch.equal(actual, wanted)
        tensors = [*inputs[0], *inputs[1:3]]
        for mine, eager in zip(
            torch.autograd.grad(actual.sum(), tensors), torch.autograd.grad(wanted.sum(), tensors)
        ):
            assert torch.equal(mine, eager)


@pytest.mark.skipif(torch.__version__ < (2, 6), reason='symbolic sizes of torch 2.6 and later')
def test_export_with_dynamic_batch_and_sizes():
    """Nothing reads a value: the sizes stay symbols all the way into the operator."""
    dim = {name: torch.export.Dim(name, min=2) for name in ('b', 'q', 'h0', 'w0', 'h1', 'w1')}
    maps = [{0: dim['b'], 2: dim[f'h{i}'], 3: dim[f'w{i}']} for i in range(2)]
    queries = {0: dim['b'], 1: dim['q']}
    module = Pyramid()
    exported = torch.export.export(
        module,
        pyramid_inputs(2, 5, [(6, 7), (3, 4)]),
        dynamic_shapes=(maps, queries, queries, queries),
    ).module()
    for sizes in DYNAMIC:
        inputs = pyramid_inputs(*sizes)
        assert torch.equal(exported(*inputs), module(*inputs))


def test_key_given_as_value_is_sampled_once(monkeypatch):
    arguments, sampled, sample = kda_arguments(), [], functional.reference.sample
    monkeypatch.setattr(
        functional.reference, 'sample', lambda *args: sampled.append(args) or sample(*args)
    )
    with ops.use_backend('reference'):
        apart = ops.key_aware_deform_attn(**{**arguments, 'key': arguments['value'].clone()})
        assert len(sampled) == 2
        shared = ops.key_aware_deform_attn(**{**arguments, 'key': arguments['value']})
    assert len(sampled) == 3
    torch.testing.assert_close(shared, apart)


@pytest.mark.parametrize('backend', ['reference', 'cpu'])
def test_autocast_rounds_features_but_not_locations(backend):
    if backend == 'cpu' and not cpu.status()[0]:
        pytest.skip(cpu.status()[1])
    arguments = kda_arguments()
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


def test_backends_are_listed_with_their_reasons():
    backends = {backend.name: backend for backend in ops.backends()}
    assert list(backends) == ['cpu', 'triton', 'reference']
    assert backends['reference'].available
    assert all(backend.detail for backend in backends.values())


def test_unknown_backend():
    expected = pytest.raises(ValueError, match=r'backend must be one of .*reference.*numpy')
    with expected, ops.use_backend('numpy'):
        pass


def test_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(cpu, 'status', lambda: (False, 'no compiler'))
    expected = pytest.raises(RuntimeError, match='cpu backend cannot run here: no compiler')
    with expected, ops.use_backend('cpu'):
        pass


def test_without_kernels_the_reference_runs(monkeypatch):
    """What happens where the kernels could not be compiled."""
    arguments = msda_arguments()
    with ops.use_backend('reference'):
        expected = ops.ms_deform_attn(**arguments)
    monkeypatch.setattr(cpu, '_kernels', None)
    monkeypatch.setattr(cpu, '_why_not', 'not compiled')
    assert cpu.why_not(arguments['value'], L) == 'not compiled'
    assert ops.backends()[0] == ('cpu', False, 'not compiled')
    assert torch.equal(ops.ms_deform_attn(**arguments), expected)


def test_backend_choice_ends_with_its_block(monkeypatch):
    calls = []
    monkeypatch.setattr(
        functional.reference, 'ms_deform_attn', lambda *args: calls.append(args) or args[0]
    )
    arguments = msda_arguments()
    with ops.use_backend('reference'):
        with ops.use_backend('reference'):
            pass
        assert functional._choice.backend == 'reference'
        ops.ms_deform_attn(**arguments)
    assert len(calls) == 1
    if cpu.status()[0]:
        with pytest.raises(KeyError), ops.use_backend('reference'):
            raise KeyError
        ops.ms_deform_attn(**arguments)
        assert len(calls) == 1


def test_forced_backend_refuses_what_it_does_not_serve():
    if not cpu.status()[0]:
        pytest.skip(cpu.status()[1])
    value = torch.randn(1, 1, 1, 300)
    locations, weights = torch.rand(1, 1, 1, 1, 1, 2), torch.rand(1, 1, 1, 1, 1)
    with ops.use_backend('cpu'), pytest.raises(ValueError, match=r'cpu backend .* these have 300'):
        ops.ms_deform_attn(value, [(1, 1)], locations, weights)
    assert ops.ms_deform_attn(value, [(1, 1)], locations, weights).shape == (1, 1, 300)


def test_backend_is_forced_for_the_thread_alone():
    seen = []

    def look() -> None:
        seen.append(functional._choice.backend)
        with ops.use_backend('reference'):
            started.set()
            ended.wait(10)

    started, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=look)
    with ops.use_backend('reference'):
        thread.start()
        started.wait(10)
    # The other thread is still inside its own block.
    assert functional._choice.backend is None
    ended.set()
    thread.join()
    assert seen == [None] and functional._choice.backend is None


@pytest.mark.skipif(torch.__version__ < (2, 6), reason='dynamo of torch 2.6 and later')
def test_compiled_graph_follows_the_forced_backend():
    torch.compiler.reset()
    arguments = msda_arguments()
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
        for name, tensor in kda_arguments().items()
        if name != 'spatial_shapes'
    }
    if shared:
        arguments['key'] = arguments['value']
    arguments = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    output = ops.key_aware_deform_attn(**arguments, spatial_shapes=SHAPES)
    assert output.is_meta and output.shape == (B, Q, M * D)
    output.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in arguments.values())
    with pytest.raises(ValueError, match='spatial_shapes'):
        ops.key_aware_deform_attn(**arguments, spatial_shapes=[(3, 4)])


@pytest.fixture(
    params=[
        f'{variant}{places}'
        for variant in ('shared', 'apart', 'standard')
        for places in ('', ', offsets', ', offsets, one reference')
    ]
)
def function(request):
    """An operator as a function of its tensors, and the tensors."""
    variant, *places = request.param.split(', ')
    arguments = msda_arguments() if variant == 'standard' else kda_arguments()
    del arguments['spatial_shapes']
    if variant == 'shared':
        del arguments['key']
    name = 'ms_deform_attn' if variant == 'standard' else 'key_aware_deform_attn'
    if places:
        arguments, name = offsets_in(arguments), f'{name}_from_offsets'
    if 'one reference' in places:
        arguments['reference_points'] = arguments['reference_points'][:1]
    names = list(arguments)

    def call(*tensors):
        given = dict(zip(names, tensors))
        if variant != 'standard':
            given = {'key': given['value'], **given}
        return getattr(ops, name)(**given, spatial_shapes=SHAPES)

    return call, list(arguments.values())


@pytest.mark.parametrize('backend', ['cpu', 'reference'])
def test_every_gradient_reaches_its_own_argument(function, backend):
    if backend == 'cpu' and not cpu.status()[0]:
        pytest.skip(cpu.status()[1])
    call, tensors = function
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_second_derivatives_and_forward_mode_are_refused(function):
    if not cpu.status()[0]:
        pytest.skip(cpu.status()[1])
    call, tensors = function
    first = tensors[0].requires_grad_()
    (grad,) = torch.autograd.grad(call(*tensors).square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice'):
        grad.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='jvp'):
        call(forward_ad.make_dual(first.detach(), first.detach()), *tensors[1:])


def test_ops_load_torch_alone():
    """The operators can be lifted out: nothing of the mm stack is loaded with them."""
    code = """
import sys
import torch
before = set(sys.modules)
sys.path.insert(0, PATH)
import ops
loaded = {name.split('.')[0] for name in set(sys.modules) - before}
assert not loaded & {'mmcv', 'mmdet', 'mmengine', 'cv2', 'mmlite'}, loaded
""".replace('PATH', repr(str(Path(functional.__file__).parents[1])))
    subprocess.run([sys.executable, '-c', code], check=True)
