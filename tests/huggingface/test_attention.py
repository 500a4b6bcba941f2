"""Models of Hugging Face transformers on our operators; configs only, nothing is downloaded."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip('transformers')

import transformers
import transformers_models as models

import mmlite
from mmlite import ops
from mmlite.huggingface import attention as adapter
from mmlite.huggingface import fuse

# Every model folder of transformers that has deformable attention, with the class it calls it.
ATTENTIONS = {
    'd_fine': 'DFineMultiscaleDeformableAttention',
    'deformable_detr': 'DeformableDetrMultiscaleDeformableAttention',
    'deimv2': 'Deimv2MultiscaleDeformableAttention',
    'grounding_dino': 'GroundingDinoMultiscaleDeformableAttention',
    'lw_detr': 'LwDetrMultiscaleDeformableAttention',
    'mask2former': 'Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention',
    'mm_grounding_dino': 'MMGroundingDinoMultiscaleDeformableAttention',
    'omdet_turbo': 'OmDetTurboMultiscaleDeformableAttention',
    'oneformer': 'OneFormerPixelDecoderEncoderMultiscaleDeformableAttention',
    'pp_doclayout_v2': 'PPDocLayoutV2MultiscaleDeformableAttention',
    'pp_doclayout_v3': 'PPDocLayoutV3MultiscaleDeformableAttention',
    'pp_doclayout_v4': 'PPDocLayoutV4MultiscaleDeformableAttention',
    'rf_detr': 'RfDetrMultiscaleDeformableAttention',
    'rt_detr': 'RTDetrMultiscaleDeformableAttention',
    'rt_detr_v2': 'RTDetrV2MultiscaleDeformableAttention',
}
SHAPES = [(6, 9), (3, 5), (2, 3)]
WIDTH, HEADS, POINTS = 32, 4, 2


def build_attention(family: str, **changes) -> nn.Module:
    """One attention module of a model folder, its weights such that every point moves."""
    try:
        folder = importlib.import_module(f'transformers.models.{family}.modeling_{family}')
    except ImportError:
        pytest.skip(f'this transformers has no {family}')
    arguments = dict(embed_dim=WIDTH, num_heads=HEADS, n_levels=len(SHAPES), n_points=POINTS)
    config = dict(
        d_model=WIDTH,
        num_feature_levels=len(SHAPES),
        decoder_n_levels=len(SHAPES),
        decoder_attention_heads=HEADS,
        decoder_cross_attention_heads=HEADS,
        decoder_n_points=POINTS,
        decoder_offset_scale=0.5,
        decoder_method='default',
        disable_custom_kernels=False,
    )
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
    return sum(isinstance(part, adapter._Fused) for part in model.modules())


def assert_same(actual, expected):
    # Sums of many terms: what is lost to rounding grows with the largest of a tensor.
    for ours, theirs in zip(actual, expected):
        scale = max(1.0, theirs.detach().abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


@pytest.fixture
def no_grid_sample(monkeypatch):
    """The reference has one too: our kernels must be there, else nothing can be told apart."""
    if not next(backend for backend in ops.backends() if backend.name == 'cpu').available:
        pytest.skip('the CPU kernels are not compiled')

    def refuse(*args, **kwargs):
        raise AssertionError("transformers' own sampling was taken")

    return lambda: monkeypatch.setattr(nn.functional, 'grid_sample', refuse)


def test_every_family_is_known():
    """A model folder that samples in the same way and is not served has to be seen."""
    from pathlib import Path

    found = [
        path.parent.name
        for path in Path(transformers.__file__).parent.glob('models/*/modeling_*.py')
        if 'ultiscaleDeformableAttention(nn.Module)' in path.read_text(encoding='utf-8')
    ]
    assert set(found) <= set(ATTENTIONS)


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
    names = list(module.state_dict())
    expected = run_attention(module, coordinates)
    assert fuse(module) is module and count_fused(module) == 1
    assert list(module.state_dict()) == names
    no_grid_sample()
    assert_same(run_attention(module, coordinates), expected)
    assert_same(run_attention(copy.deepcopy(module), coordinates), expected)


@pytest.mark.parametrize('family', WAYS)
def test_the_change_is_undone(family):
    module, other = build_attention(family), build_attention(family)
    before = {name: type(part) for name, part in module.named_modules()}
    fuse(fuse(module))
    assert all(isinstance(part, before[name]) for name, part in module.named_modules())
    fused = run_attention(module)
    loaded = pickle.loads(pickle.dumps(module))
    assert_same(run_attention(loaded), fused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, 'ms_deform_attn', None)
        with pytest.raises(TypeError):
            run_attention(module)
        run_attention(other)
        for restored in (module, loaded, copy.deepcopy(module)):
            mmlite.restore(restored)
            assert {name: type(part) for name, part in restored.named_modules()} == before
            assert_same(run_attention(restored), fused)


@pytest.mark.parametrize('family', WAYS)
def test_compiled(family):
    module = build_attention(family)
    fuse(module)
    expected = run_attention(module)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=backend)
    assert_same(run_attention(module, call=compiled), expected)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any('mmlite.deform_attn' in target for target in called)
    assert not any('grid_sample' in target for target in called)


def test_a_model_without_deformable_attention():
    with pytest.raises(ValueError, match='Linear has no deformable attention'):
        fuse(nn.Linear(2, 2))


@pytest.mark.parametrize('family', ['rt_detr_v2', 'd_fine'])
def test_the_nearest_pixel_is_another_function(family):
    module = build_attention(family, decoder_method='discrete')
    with pytest.raises(ValueError, match="decoder_method='default'"):
        fuse(module)


def test_a_version_that_is_too_old(monkeypatch):
    monkeypatch.setattr('transformers.__version__', '4.20.1')
    with pytest.raises(ImportError, match=r'transformers 4\.20\.1 is too old .* pip install'):
        fuse(build_attention('deformable_detr'))
    monkeypatch.setattr('transformers.__version__', str(adapter.OLDEST))
    assert count_fused(fuse(build_attention('deformable_detr'))) == 1


@pytest.mark.parametrize('name', models.MODELS)
def test_whole_models(name, no_grid_sample):
    model = models.MODELS[name]()
    with torch.no_grad():
        expected = models.outputs(model)
        names = list(model.state_dict())
        assert count_fused(fuse(model)) > 0
        assert list(model.state_dict()) == names
        if name not in ('mask2former', 'oneformer'):  # whose masks are sampled in other places
            no_grid_sample()
        assert_same(models.outputs(model), expected)


def test_training_step(no_grid_sample):
    labels = [
        dict(class_labels=torch.tensor([0, 1]), boxes=torch.rand(2, 4) * 0.3 + 0.2),
        dict(class_labels=torch.tensor([1]), boxes=torch.rand(1, 4) * 0.3 + 0.2),
    ]
    model = models.deformable_detr(
        two_stage=True, two_stage_num_proposals=12, with_box_refine=True
    ).train()

    def step():
        model.zero_grad()
        loss = model(**models.inputs(model), labels=labels).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = step()
    fuse(model)
    no_grid_sample()
    for ours, theirs in zip(step(), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attentions_are_returned():
    model = models.mask2former()
    fuse(model)
    result = model(**models.inputs(model), output_attentions=True, output_hidden_states=True)
    assert len(result.attentions) > 0
    model = models.rt_detr_v2()
    fuse(model)
    assert len(model(**models.inputs(model), output_attentions=True).cross_attentions) == 2


@pytest.mark.parametrize('name', models.MODELS)
def test_gradients_of_whole_models(name):
    """Of every parameter, within 1e-5 of the largest one, beside what float32 loses in both."""

    def gradients(model):
        outputs = models.outputs(model)
        # Behind the padded text the logits are infinite.
        sum(output[output.isfinite()].square().mean() for output in outputs).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    stock = models.MODELS[name]()
    fused, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    fuse(fused)
    expected, actual, exact = gradients(stock), gradients(fused), gradients(exact)
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in exact.values())
    lost = max((expected[name] - exact[name]).abs().max().item() for name in exact)
    for parameter, gradient in expected.items():
        tolerance = 1e-5 * scale + 3 * lost
        torch.testing.assert_close(actual[parameter], gradient, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize('name', WAYS)
def test_saving_and_loading(name, tmp_path):
    model = models.MODELS[name]()
    expected = models.outputs(model)
    fuse(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert count_fused(loaded) == 0
    assert_same(models.outputs(loaded), expected)
    fuse(loaded)
    assert_same(models.outputs(loaded), expected)
