import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip('transformers')

import transformers_models as models
from transformers_models import assert_same, gradients

import mmlite
from mmlite.huggingface import fuse, load_lite, to_lite
from mmlite.nn import EncoderSchedule, InterleavedEncoder
from mmlite.nn.distill import distill

# Builders, and the levels of a schedule that fits: all of these have four layers.
FAMILIES = {
    'deformable_detr': 'H3L1',
    'grounding_dino': 'H3L1',
    'mm_grounding_dino': 'H2L2',
    'mask2former': 'H2L1',
    'oneformer': 'H2L1',
}
EVERY_FAMILY = pytest.mark.parametrize('family', FAMILIES)
# One of each class of encoder.
KINDS = pytest.mark.parametrize('family', ['deformable_detr', 'grounding_dino', 'mask2former'])


def build(family: str) -> nn.Module:
    return models.MODELS[family]()


def lite(family: str, **options) -> nn.Module:
    return to_lite(build(family), f'{FAMILIES[family]}-(2+1)x2', **options)


def lite_encoder(model: nn.Module) -> InterleavedEncoder:
    (encoder,) = [part for part in model.modules() if isinstance(part, InterleavedEncoder)]
    return encoder


@pytest.mark.parametrize('family', [*FAMILIES, 'with another activation'])
def test_every_level_in_every_layer_is_the_stock_model(family):
    if family in FAMILIES:
        model = build(family)
    else:
        family, model = 'deformable_detr', models.deformable_detr(activation_function='gelu')
    stock = copy.deepcopy(model)
    schedule = f'{FAMILIES[family]}-(1+1)x4'
    assert to_lite(model, schedule, key_aware=False, small_ffn=False) is model
    assert_same(models.outputs(model), models.outputs(stock))
    (_, actual), (_, expected) = gradients(model.double()), gradients(stock.double())
    for name, grad in expected.items():
        if 'encoder.' not in name:
            torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-4)


# What `to_lite` can be asked for beside the defaults.
OPTIONS = {
    'default': {},
    'standard': dict(key_aware=False),
    'proj_key': dict(proj_key=True),
    'same_loc': dict(same_loc=True),
    'one_ffn': dict(small_ffn=False),
    'sequential': dict(update='sequential'),
    'recomputed': dict(num_cp=2),
}


@pytest.mark.parametrize('options', OPTIONS)
@EVERY_FAMILY
def test_training_reaches_every_parameter(family, options):
    model = lite(family, **OPTIONS[options]).train()
    encoder = lite_encoder(model)
    runs = []
    for layer in (*encoder.layers, *getattr(encoder, 'fusion_layers', [])):
        # Recomputing stops as soon as it has what it needs, before the layer returns.
        layer.register_forward_pre_hook(lambda layer, *_: runs.append(layer))
    predicted = models.outputs(model)
    forward = len(runs)
    # By two losses: softmax and masks make a plain sum constant in some of them.
    sum(output[output.isfinite()].square().sum() for output in predicted).backward()
    assert len(runs) == forward * (1.5 if options == 'recomputed' else 1)
    for name, p in encoder.named_parameters():
        if not name.startswith('text_enhancer_layers'):  # only the proposals' scores read the last
            assert p.grad is not None and p.grad.isfinite().all(), name


@KINDS
def test_distilled_from_the_stock_model(family):
    """As docs/from-stock.md shows it, where every encoder is called in its own way."""
    model = build(family)
    teacher = copy.deepcopy(model)
    to_lite(model, f'{FAMILIES[family]}-(2+1)x2')
    trained = set(lite_encoder(model).parameters())
    others = [(other, other.clone()) for other in model.parameters() if other not in trained]
    losses = []
    batches = [models.inputs(model)]
    distill(model, teacher, batches, 30, report=lambda iteration, loss: losses.append(loss))
    assert losses[-1] < 0.75 * losses[0]
    assert all(torch.equal(other, before) for other, before in others)


def test_small_maps_are_the_high_level_ones():
    """Mask2Former's pyramid starts with its smallest map, Deformable DETR's with its largest."""
    sizes = [(2, 3), (4, 6), (8, 12)]
    for family, ordered in (('mask2former', sizes), ('deformable_detr', [*sizes[::-1], (1, 2)])):
        encoder = lite_encoder(lite(family))
        waiting = [run for run in encoder.step_tokens(0, ordered).runs if not run.is_updated]
        assert [run.stop - run.start for run in waiting] == [8 * 12]


def test_the_text_meets_the_tokens_of_the_step():
    model = lite('grounding_dino')
    seen = []
    for layer in lite_encoder(model).fusion_layers:
        layer.register_forward_hook(lambda _, args, output: seen.append(args[0].shape[1]))
    models.outputs(model)
    high = 6 * 8 + 3 * 4 + 2 * 2
    assert seen == [high, 12 * 16 + high] * 2


@KINDS
def test_saving_and_loading(family, tmp_path):
    same = EncoderSchedule.parse(f'{FAMILIES[family]}-(2+1)x2')
    model = lite(family, update='sequential', elastic=[same]).half().float()
    if family != 'mask2former':  # of which transformers makes a model that cannot be pickled
        model = pickle.loads(pickle.dumps(model))
    expected = models.outputs(model)
    model.save_pretrained(tmp_path)
    loaded = load_lite(type(model), tmp_path).eval()
    assert type(loaded) is type(model)
    assert_same(models.outputs(loaded), expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_same(models.outputs(copy.deepcopy(model)), expected)
    build(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='saved without a Lite encoder'):
        load_lite(type(model), tmp_path)


@EVERY_FAMILY
def test_with_fused_attention_and_back(family):
    model = build(family)
    (name,) = [n for n, m in lite(family).named_modules() if isinstance(m, InterleavedEncoder)]
    model.other = model.get_submodule(name)
    before, stock = models.outputs(model), {name: type(m) for name, m in model.named_modules()}
    to_lite(fuse(model), f'{FAMILIES[family]}-(2+1)x2')
    assert model.other is lite_encoder(model)
    expected = models.outputs(model)
    assert_same(models.outputs(fuse(model)), expected)
    if family != 'mask2former':
        model = copy.deepcopy(model)
    mmlite.restore(model)
    assert {name: type(m) for name, m in model.named_modules()} == stock
    assert not hasattr(model.config, 'lite_encoder')
    assert model.other is model.get_submodule(name)
    for ours, theirs in zip(models.outputs(model), before):
        assert torch.equal(ours, theirs)


def same_name() -> nn.Module:
    """A model of one's own whose encoder has the name of one of transformers."""
    model = nn.Module()
    model.encoder = type('DeformableDetrEncoder', (nn.Module,), {})()
    return model


@pytest.mark.parametrize(
    'schedule, options, sentence',
    [
        ('H3L1-(2+1)x3', {}, r'num_layers is 4; use one of H3L1-\(1\+1\)x4, H3L1-\(2\+1\)x2'),
        ('H2L1-(2+1)x2', {}, r'num_levels=4; use H3L1-\(2\+1\)x2, H2L2-\(2\+1\)x2'),
        ('H3L1', {}, 'is not of the form'),
        ('H3L1-(2+1)x2', dict(proj_key=True, key_aware=False), 'set key_aware=True'),
        (None, lambda: lite('deformable_detr'), 'has a Lite encoder already'),
        (None, lambda: build('rt_detr'), 'RTDetrForObjectDetection has no encoder'),
        (None, same_name, 'Module has no encoder .* Deformable DETR'),
    ],
)
def test_refusals(schedule, options, sentence):
    model, options = (build('deformable_detr'), options) if schedule else (options(), {})
    before = [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match=sentence):
        to_lite(model, schedule or 'H3L1-(2+1)x2', **options)
    assert [type(part) for part in model.modules()] == before


@pytest.mark.parametrize('before', [True, False])
def test_gradient_checkpointing_is_followed(before):
    model = build('deformable_detr')
    if before:
        model.gradient_checkpointing_enable()
    to_lite(model, 'H3L1-(2+1)x2').train()
    if not before:
        model.gradient_checkpointing_enable()
    runs = []
    for layer in lite_encoder(model).layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    for recomputed in (True, False):
        outputs = models.outputs(model)
        assert len(runs) == 4
        sum(output.square().sum() for output in outputs).backward()
        assert len(runs) == (8 if recomputed else 4)
        model.gradient_checkpointing_disable()
        runs.clear()


class Logits(torch.nn.Module):
    """A model whose output torch can trace."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).logits


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('change', [fuse, lambda model: to_lite(model, 'H3L1-(2+1)x2')])
def test_traced_by_jit(change):
    """Where the sizes of the maps are tensors."""
    model = Logits(change(build('deformable_detr')).eval())
    pixels = models.inputs(model.model)['pixel_values'][:1]
    traced = torch.jit.trace(model, (pixels,), check_trace=False)
    assert_same([traced(pixels)], [model(pixels)])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('change', [fuse, lambda model: to_lite(model, 'H3L1-(2+1)x2')])
def test_onnx(change, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = change(build('deformable_detr')).eval()
    pixels = models.inputs(model)['pixel_values'][:1]
    with torch.no_grad():
        expected = model(pixels)
    path = tmp_path / 'model.onnx'
    torch.onnx.export(model, (pixels,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    found = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert_same([torch.from_numpy(found[0])], [expected.logits], 1e-4)
