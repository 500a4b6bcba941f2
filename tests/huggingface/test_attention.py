import copy
import importlib
import inspect
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip('transformers')

import transformers
import transformers_models as models
from transformers_models import assert_same, gradients

import mmlite
from mmlite import ops
from mmlite.huggingface import attention as adapter
from mmlite.huggingface import fuse
from mmlite.models import Fused

# Every model folder of transformers that has deformable attention, with the class it calls it.
ATTENTIONS = {
    path.parent.name: found[1]
    for path in sorted(Path(transformers.__file__).parent.glob('models/*/modeling_*.py'))
    if (found := re.search(r'class (\w+ultiscaleDeformableAttention)\(', path.read_text('utf-8')))
}
SHAPES = [(6, 9), (3, 5), (2, 3)]
WIDTH, HEADS, POINTS = 32, 4, 2


def build_attention(family: str, **changes) -> nn.Module:
    """One attention module of a model folder, its weights such that every point moves."""
    folder = importlib.import_module(f'transformers.models.{family}.modeling_{family}')
    arguments = dict(embed_dim=WIDTH, num_heads=HEADS, n_levels=len(SHAPES), n_points=POINTS)
    config = dict(d_model=WIDTH, decoder_n_points=POINTS, decoder_offset_scale=0.5)
    config |= dict.fromkeys(['num_feature_levels', 'decoder_n_levels'], len(SHAPES))
    config |= dict.fromkeys([f'decoder_{kind}attention_heads' for kind in ('', 'cross_')], HEADS)
    config |= dict(decoder_method='default', disable_custom_kernels=False)
    arguments['config'] = SimpleNamespace(**{**config, **changes})
    attention = getattr(folder, ATTENTIONS[family])
    accepted = inspect.signature(attention.__init__).parameters
    torch.manual_seed(0)
    module = attention(**{name: value for name, value in arguments.items() if name in accepted})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def run_attention(module: nn.Module, coordinates: int = 4, call=None) -> list[torch.Tensor]:
    """The outputs, and the gradients of inputs and parameters."""
    call = module if call is None else call
    torch.manual_seed(1)
    tokens = sum(height * width for height, width in SHAPES)
    query = torch.randn(2, 7, WIDTH, requires_grad=True)
    memory = torch.randn(2, tokens, WIDTH, requires_grad=True)
    levels = 1 if hasattr(module, 'offset_scale') else len(SHAPES)
    # D-FINE's takes the value as it is, and no mask of tokens.
    mask = torch.rand(2, tokens) < 0.5 if hasattr(module, 'value_proj') else None
    reference_points = torch.rand(2, 7, levels, coordinates, requires_grad=True)
    shapes = torch.tensor(SHAPES)
    as_tensor = 'spatial_shapes' in inspect.signature(type(module).forward).parameters
    outputs = call(
        hidden_states=query,
        encoder_hidden_states=memory,
        attention_mask=mask,
        reference_points=reference_points,
        spatial_shapes_list=SHAPES,
        level_start_index=torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]]),
        **({'spatial_shapes': shapes} if as_tensor else {}),
    )
    inputs = [query, memory, reference_points, *module.parameters()]
    loss = sum(output.square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def count_fused(model: nn.Module) -> int:
    return sum(isinstance(part, Fused) for part in model.modules())


@pytest.fixture
def no_grid_sample(monkeypatch):
    """Takes PyTorch's sampling away, which transformers has and so has our reference."""
    if not next(backend for backend in ops.backends() if backend.name == 'cpu').available:
        pytest.skip('the CPU kernels are not compiled')

    return lambda: monkeypatch.setattr(nn.functional, 'grid_sample', None)


CASES = [
    *((family, 4, {}) for family in ATTENTIONS),
    *((family, 2, {}) for family in ('deformable_detr', 'mask2former', 'oneformer', 'rt_detr')),
    *((family, 4, dict(decoder_n_points=[3, 1, 2])) for family in ('d_fine', 'deimv2')),
]
# One of each way in which transformers reaches its sampling.
WAYS = ['deformable_detr', 'mask2former', 'd_fine']


@pytest.mark.parametrize(('family', 'coordinates', 'changes'), CASES)
def test_outputs_and_gradients_are_the_same(family, coordinates, changes, no_grid_sample):
    module = build_attention(family, **changes)
    names, types = list(module.state_dict()), [*map(type, module.modules())]
    expected = run_attention(module, coordinates)
    assert fuse(fuse(module)) is module and count_fused(module) == 1
    assert list(module.state_dict()) == names
    assert all(map(isinstance, module.modules(), types))
    restored = mmlite.restore(pickle.loads(pickle.dumps(module)))
    assert [*map(type, restored.modules())] == types
    assert_same(run_attention(restored, coordinates), expected)
    no_grid_sample()
    assert_same(run_attention(module, coordinates), expected)
    assert_same(run_attention(copy.deepcopy(module), coordinates), expected)


@pytest.mark.parametrize('family', WAYS)
def test_compiled(family):
    module = fuse(build_attention(family))
    expected = run_attention(module)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(module, backend=lambda graph, _: graphs.append(graph) or graph)
    assert_same(run_attention(module, call=compiled), expected)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any('mmlite.deform_attn' in target for target in called)
    assert not any('grid_sample' in target for target in called)


@pytest.mark.parametrize(
    'build, sentence',
    [
        (lambda: nn.Linear(2, 2), 'Linear has no deformable attention'),
        *(
            (lambda f=f: build_attention(f, decoder_method='discrete'), "decoder_method='default'")
            for f in ('rt_detr_v2', 'd_fine')
        ),
    ],
)
def test_other_models_are_refused(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        fuse(build())


def test_a_version_that_is_too_old(monkeypatch):
    monkeypatch.setattr('transformers.__version__', '4.20.1')
    for change in (mmlite.huggingface.to_lite, lambda model, _: fuse(model)):
        with pytest.raises(ImportError, match=r'transformers 4\.20\.1 is too old.* pip install'):
            change(build_attention('deformable_detr'), 'H3L1-(2+1)x2')
    monkeypatch.setattr('transformers.__version__', str(adapter.OLDEST))
    assert count_fused(fuse(build_attention('deformable_detr'))) == 1


@pytest.mark.parametrize('name', models.MODELS)
def test_whole_models(name, no_grid_sample):
    """The gradients within 1e-5 of the largest one, beside what float32 loses in both."""
    stock = models.MODELS[name]()
    fused = fuse(copy.deepcopy(stock))
    assert count_fused(fused) > 0 and list(fused.state_dict()) == list(stock.state_dict())
    (outputs, expected), (_, exact) = gradients(stock), gradients(copy.deepcopy(stock).double())
    if name not in ('mask2former', 'oneformer'):  # whose masks are sampled in other places
        no_grid_sample()
    fused_outputs, actual = gradients(fused)
    assert_same(fused_outputs, outputs)
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in exact.values())
    lost = max((expected[name] - exact[name]).abs().max().item() for name in exact)
    for parameter, gradient in expected.items():
        tolerance = 1e-5 * scale + 3 * lost
        torch.testing.assert_close(actual[parameter], gradient, rtol=1e-5, atol=tolerance)


def test_attentions_are_returned():
    for name, kind in (('mask2former', 'attentions'), ('rt_detr_v2', 'cross_attentions')):
        model = fuse(models.MODELS[name]())
        assert len(model(**models.inputs(model), output_attentions=True)[kind]) > 0
