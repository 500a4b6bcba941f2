import copy
from collections import Counter

import pytest
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from thin_encoder import SIZES, THIN, inputs, randomised
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmlite import layers
from mmlite.nn import (
    KeyAwareDeformableAttention,
    LiteEncoder,
    StepTokens,
    encoder_reference_points,
)
from mmlite.openmmlab.checkpoints import convert_encoder_state

OPTIONS = [
    dict(),
    dict(key_aware=False, small_ffn=False),
    dict(update='sequential', proj_key=True),
    dict(same_loc=True, schedule='H2L2-(3+1)x1'),
    dict(schedule='H4L0-12:12x2+123:123+1234x2'),
]


def build(options: dict) -> LiteEncoder:
    return LiteEncoder(**{'schedule': 'H3L1-(2+1)x1', **options}, **THIN)


@pytest.mark.parametrize('options', [*OPTIONS, dict(key_aware=False, schedule='H4L0-12:12+1234')])
def test_is_the_mmdetection_encoder_bit_for_bit(options):
    options = {'schedule': 'H3L1-(2+1)x2', **options}
    core = randomised(LiteEncoder(**options, **THIN))
    attention = {k: options.pop(k) for k in ('proj_key', 'same_loc') if k in options}
    face = layers.LiteEncoder(
        **options,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=32, num_heads=4, dropout=0.0, **attention),
            ffn_cfg=dict(embed_dims=32, feedforward_channels=64),
        ),
    )
    assert list(face.state_dict()) == list(core.state_dict())
    face.load_state_dict(core.state_dict())
    arguments = inputs()
    memory = core(**arguments)
    shapes = torch.tensor(SIZES)
    assert torch.equal(
        face(
            query=arguments['tokens'],
            query_pos=arguments['pos'],
            key_padding_mask=arguments['padding_mask'],
            spatial_shapes=shapes,
            level_start_index=None,
            valid_ratios=arguments['valid_ratios'],
        ),
        memory,
    )
    core.load_state_dict(face.state_dict())


@pytest.mark.parametrize('order', [(3, 2, 1, 0), (1, 0, 3, 2), (2, 0, 3, 1)])
@pytest.mark.parametrize('schedule', ['H3L1-(2+1)x1', 'H2L2-(2+1)x1'])
@pytest.mark.parametrize('update', ['joint', 'sequential'])
def test_levels_in_any_order(order, schedule, update):
    """With offsets that every level shares, the order of the levels is a matter of order alone."""
    encoder = randomised(LiteEncoder(schedule, **THIN, same_loc=True, update=update))
    arguments = inputs()

    def turned(tensor):
        pieces = tensor.split([h * w for h, w in SIZES], 1)
        return torch.cat([pieces[level] for level in order], 1)

    other = encoder(
        turned(arguments['tokens']),
        turned(arguments['pos']),
        [SIZES[level] for level in order],
        padding_mask=turned(arguments['padding_mask']),
        valid_ratios=arguments['valid_ratios'][:, order],
    )
    torch.testing.assert_close(other, turned(encoder(**arguments)), atol=2e-5, rtol=1e-4)


def test_low_levels_can_be_chosen():
    encoder = LiteEncoder('H3L1-(2+1)x1', **THIN, low_levels=[1])
    arguments = inputs()
    seen = []
    encoder(**arguments, before_layer=lambda i, memory, step: seen.append(step) or memory)
    (low,) = [run for run in seen[0].runs if run.is_low]
    assert (low.start, low.stop) == (88, 112)
    tokens = arguments['tokens']
    assert torch.equal(seen[1].low(seen[1].pick(tokens)), tokens[:, 88:112])
    with pytest.raises(ValueError, match=r'1 low-level of 4 maps; low_levels=\[0, 1\]'):
        LiteEncoder('H3L1-(2+1)x1', **THIN, low_levels=[0, 1])
    for schedule, wrong in (
        ('H3L1-(2+1)x1', [4]),
        ('H2L2-(2+1)x1', [1, 1]),
        ('H3L1-12+1234', [0]),
    ):
        with pytest.raises(ValueError, match='low_levels'):
            LiteEncoder(schedule, **THIN, low_levels=wrong)


def test_a_step_of_ones_own_before_each_layer():
    encoder = randomised(LiteEncoder('H3L1-(2+1)x1', **THIN))
    arguments = inputs()
    counts = []

    def add(index: int, memory: torch.Tensor, step: StepTokens) -> torch.Tensor:
        counts.append((index, step.pick(memory).shape[1]))
        updated = [tokens + 1 for _, tokens in step.split(step.pick(memory))]
        return step.put_back(memory, updated)

    memory = encoder(**arguments, before_layer=add)
    assert counts == [(0, 32), (1, 120)]
    expected = arguments['tokens'].clone()
    expected[:, 88:] += 1
    points = encoder_reference_points(SIZES, arguments['valid_ratios'])
    for index, layer in enumerate(encoder.layers):
        step_tokens = encoder.step_tokens(index, SIZES)
        expected = layer(
            expected + index,
            arguments['pos'],
            step_tokens,
            arguments['padding_mask'],
            points,
            SIZES,
        )
    torch.testing.assert_close(memory, expected)


def test_no_padding_is_all_valid():
    encoder = randomised(LiteEncoder('H3L1-(2+1)x1', **THIN))
    arguments = {**inputs(), 'padding_mask': None}
    expected = encoder(**{**arguments, 'valid_ratios': torch.ones(2, 4, 2)})
    actual = encoder(**{**arguments, 'valid_ratios': None})
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('gradients', [True, False])
def test_chunks_change_nothing(gradients):
    whole = randomised(LiteEncoder('H3L1-(2+1)x2', **THIN, chunk_size=None))
    chunked = LiteEncoder('H3L1-(2+1)x2', **THIN, chunk_size=7)
    chunked.load_state_dict(whole.state_dict())
    arguments = inputs()
    with torch.set_grad_enabled(gradients):
        expected, actual = whole(**arguments), chunked(**arguments)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    if gradients:
        expected.sum().backward()
        actual.sum().backward()
        for ours, theirs in zip(chunked.parameters(), whole.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)


def test_one_path_with_gradients_and_without():
    """Inference changes none of its inputs, and keeps nothing that training could not use."""
    encoder, arguments = randomised(LiteEncoder('H3L1-(2+1)x2', **THIN)), inputs()
    before = copy.deepcopy(arguments)
    with torch.inference_mode():
        expected = encoder(**arguments)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)
    actual = encoder.train()(**arguments)
    assert torch.equal(actual, expected.clone())
    actual.sum().backward()


@pytest.mark.parametrize('update', ['joint', 'sequential'])
@pytest.mark.parametrize('small_ffn', [True, False])
@pytest.mark.parametrize('key_aware', [True, False])
def test_updates_what_the_schedule_says(update, small_ffn, key_aware):
    """Follow the tokens from layer to layer, one plain step after the other."""
    options = dict(key_aware=key_aware, small_ffn=small_ffn, update=update)
    encoder, arguments = randomised(LiteEncoder('H2L2-(2+1)x2', **THIN, **options)), inputs()
    points = DeformableDetrTransformerEncoder.get_encoder_reference_points(
        torch.tensor(SIZES), arguments['valid_ratios'], 'cpu'
    )
    is_low = torch.arange(points.shape[1]) < sum(h * w for h, w in SIZES[:2])
    memory = arguments['tokens']
    order = {'joint': ['high', 'all'] * 2, 'sequential': ['high', 'high', 'low'] * 2}[update]
    assert len(encoder.layers) == len(order)
    for kind, layer in zip(order, encoder.layers):
        attended = layer.self_attn(
            memory,
            query_pos=arguments['pos'],
            key_padding_mask=arguments['padding_mask'],
            reference_points=points,
            spatial_shapes=SIZES,
        )
        attended = layer.norms[0](attended)
        normal = small = memory
        if kind != 'low' or not small_ffn:
            normal = small = layer.norms[1](layer.ffn(attended))
        if kind != 'high' and small_ffn:
            small = layer.small_norm(layer.small_ffn(attended))
        updated = torch.where(is_low[:, None], small, normal if kind != 'low' else memory)
        keep = is_low if kind == 'high' else torch.zeros_like(is_low)
        memory = torch.where(keep[:, None], memory, updated)
    torch.testing.assert_close(encoder(**arguments), memory, atol=2e-5, rtol=1e-4)


def test_activation_checkpointing_changes_nothing():
    plain = randomised(LiteEncoder('H3L1-(2+1)x2', **THIN))
    recomputed = randomised(LiteEncoder('H3L1-(2+1)x2', **THIN, num_cp=3))
    arguments, calls = inputs(), Counter()
    for number, layer in enumerate(recomputed.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    expected, actual = plain(**arguments), recomputed(**arguments)
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    assert calls == {0: 2, 1: 2, 2: 2, 3: 1}  # the first three again in the backward pass
    for ours, theirs in zip(recomputed.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    recomputed.eval()(**arguments).sum().backward()
    assert calls == {0: 3, 1: 3, 2: 3, 3: 2}


@pytest.mark.parametrize('gradients', [True, False])
def test_hooks_fire(gradients):
    encoder = LiteEncoder('H3L1-(2+1)x1', **THIN, proj_key=True)
    called = set()
    for name, module in encoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.set_grad_enabled(gradients):
        encoder(**inputs())
    containers = {
        name for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)
    }
    assert called == {name for name, _ in encoder.named_modules()} - containers


class FromMaps(nn.Module):
    """As a model uses the encoder: the level sizes are those of its feature maps."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, maps, padding_mask=None, valid_ratios=None):
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        sizes = [tuple(x.shape[-2:]) for x in maps]
        return self.encoder(
            tokens, 0.1 * tokens, sizes, padding_mask=padding_mask, valid_ratios=valid_ratios
        )


def feature_maps(batch=2, height=2, width=3, **kwargs):
    return [
        torch.randn(batch, 32, height * 8 // 2**level, width * 8 // 2**level, **kwargs)
        for level in range(4)
    ]


@pytest.mark.parametrize('options', OPTIONS)
def test_compiles_into_one_graph_for_all_sizes(options):
    model = FromMaps(randomised(build(options)))
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for maps in (feature_maps(), feature_maps(3, 3, 5)):
        torch.testing.assert_close(compiled(maps), model(maps))
    assert len(graphs) == 1


@pytest.mark.parametrize('options', OPTIONS)
def test_exports(options):
    model = FromMaps(randomised(build(options)))
    model.eval()
    maps = feature_maps()
    if not hasattr(torch.export.Dim, 'AUTO'):  # dynamic sizes of one origin came with torch 2.6
        program = torch.export.export(model, (maps,))
        torch.testing.assert_close(program.module()(maps), model(maps))
        return
    batch, height, width = (torch.export.Dim(n, min=1, max=64) for n in ('batch', 'h', 'w'))
    dynamic = [
        {0: batch, 2: 8 // 2**level * height, 3: 8 // 2**level * width} for level in range(4)
    ]
    program = torch.export.export(model, (maps,), dynamic_shapes=(dynamic,))
    for some in (maps, feature_maps(3, 3, 5)):
        torch.testing.assert_close(program.module()(some), model(some))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('options', OPTIONS)
def test_reads_nothing_back(options, training):
    """Meta tensors have no values at all, and autograd runs on them."""
    encoder = build(options).to('meta').requires_grad_(training)
    arguments = {
        name: value.to('meta') if isinstance(value, torch.Tensor) else value
        for name, value in inputs().items()
    }
    tokens = arguments['tokens'].requires_grad_(training)
    memory = encoder(**arguments)
    assert memory.shape == tokens.shape
    if training:
        memory.sum().backward()
        assert tokens.grad.shape == tokens.shape
        assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(schedule='H3L1'), 'not of the form'),
        (dict(embed_dims=30, num_heads=4), 'embed_dims must be a multiple of num_heads'),
        (dict(key_aware=False, proj_key=True), 'set key_aware=True'),
        (dict(update='both'), 'update must be one of'),
    ],
)
def test_unfitting_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiteEncoder(**{'schedule': 'H3L1-(2+1)x1', **arguments})


def test_defaults_are_the_papers():
    """256 channels, 8 heads, 4 points, an FFN of 2048; a key-aware attention of its own offsets."""
    layer = LiteEncoder('H3L1-(1+1)x1').layers[0]
    attention = layer.self_attn
    assert attention.sampling_offsets.weight.shape == (8 * 4 * 4 * 2, 256)
    assert layer.ffn.layers[0][0].weight.shape == (2048, 256) and layer.has_small_ffn
    assert KeyAwareDeformableAttention().sampling_offsets.weight.shape == (8 * 4 * 4 * 2, 256)
    assert attention.key_proj is None


def test_unfitting_features():
    encoder = LiteEncoder('H3L1-(2+1)x1', **THIN)
    for wrong, message in (
        ({'level_sizes': SIZES[:3]}, 'takes 4 feature levels; got 3'),
        ({'tokens': inputs()['tokens'][:, 1:]}, r'\(120 tokens\) and 119 tokens'),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(**{**inputs(), **wrong})


@pytest.mark.parametrize('decay', [0.9, 0.9995])
def test_averages_of_the_whole_state_keep_the_schedule(decay):
    encoder = LiteEncoder('H3L1-(2+1)x3', **THIN)
    average = AveragedModel(encoder, avg_fn=lambda old, new, _: old * decay + new * (1 - decay))
    average.use_buffers = True
    for _ in range(50):
        average.update_parameters(encoder)
    torch.testing.assert_close(average.module.schedule_code, encoder.schedule_code)
    LiteEncoder('H3L1-(2+1)x3', **THIN).load_state_dict(average.module.state_dict())


@pytest.mark.parametrize('assign', [{}, {'assign': True}])
@pytest.mark.parametrize(
    ('dtype', 'shift'),
    [(torch.int64, 0), (torch.float16, 0), (torch.bfloat16, 0), (torch.float32, -0.01)],
)
@pytest.mark.filterwarnings('error')
def test_codes_of_any_dtype_and_averages_are_loaded(dtype, shift, assign):
    encoder = LiteEncoder('H2L2-(3+1)x1', **THIN)
    state = encoder.state_dict()
    given = state['schedule_code'].to(dtype) + shift
    state['schedule_code'] = given.clone()
    encoder.load_state_dict(state, **assign)
    assert encoder.schedule_code.tolist() == [2, 2, 3, 1, 0]
    assert torch.equal(state['schedule_code'], given)  # the caller's stay as they are
    encoder.half().load_state_dict(encoder.state_dict())
    assert encoder.schedule_code.tolist() == [2, 2, 3, 1, 0]


@pytest.mark.parametrize(
    'other',
    [
        dict(schedule='H2L2-(2+1)x1'),  # the same names and shapes
        dict(schedule='H3L1-(1+1)x2'),
        dict(update='sequential'),
    ],
)
def test_weights_carry_their_schedule(other):
    state, model = build({}).state_dict(), build(other)
    before = [parameter.clone() for parameter in model.parameters()]
    for strict in (True, False):
        message = r'trained with schedule H3L1-\(2\+1\)x1 and joint updates'
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(state, strict=strict)
    assert all(map(torch.equal, model.parameters(), before))
    build({}).load_state_dict(state)
    if other == dict(schedule='H2L2-(2+1)x1'):  # without a code they are taken as they are
        del state['schedule_code']
        model.load_state_dict(state)


@pytest.mark.parametrize('name', ['h2l2_2p1x3', 'h3l1_2p1x3', 'h3l1_6p1x1_nokda'])
def test_golden(golden, name):
    arrays, meta = golden(f'encoder_{name}.npz')
    names = ('embed_dims', 'num_heads', 'num_points', 'feedforward_channels')
    names += ('schedule', 'key_aware', 'small_ffn')
    encoder = LiteEncoder(**{name: meta[name] for name in names})
    official = {k[len('state.') :]: v for k, v in arrays.items() if k.startswith('state.')}
    encoder.load_state_dict(convert_encoder_state(official))
    memory = encoder(
        arrays['feat'],
        arrays['pos'],
        arrays['spatial_shapes'].tolist(),
        padding_mask=arrays['key_padding_mask'],
        valid_ratios=arrays['valid_ratios'],
    )
    torch.testing.assert_close(memory, arrays['memory'], atol=1e-4, rtol=0)
