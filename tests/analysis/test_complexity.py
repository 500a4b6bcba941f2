"""Counts against closed formulas, published measurements and an independent counter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from mmengine.hub import get_config
from small_detectors import small_config
from torch import nn

from mmlite import ops
from mmlite.analysis.complexity import (
    count_detector,
    count_flops,
    count_parameters,
    deform_attn_flops,
    encoder_flops,
    strides,
)
from mmlite.analysis.inputs import encoder_inputs, image_batch, pyramid_sizes
from mmlite.openmmlab.build import build_detector, load_config
from mmlite.openmmlab.layers import LiteEncoder
from mmlite.openmmlab.lite_config import lite_change, main_schedule

DIMS, HEADS, LEVELS, POINTS = 256, 8, 4, 4
PUBLISHED_SIZE = (850, 1040)
TINY = [(6, 8), (3, 4), (2, 2), (1, 1)]


def layer_cfg(ffn: int = 2048) -> dict:
    return {
        'self_attn_cfg': {'embed_dims': DIMS, 'num_levels': LEVELS, 'batch_first': True},
        'ffn_cfg': {'embed_dims': DIMS, 'feedforward_channels': ffn},
    }


def stock(ffn: int = 2048) -> nn.Module:
    return DeformableDetrTransformerEncoder(num_layers=6, layer_cfg=layer_cfg(ffn))


def lite(schedule: str = 'H3L1-(2+1)x3', ffn: int = 2048, **kwargs) -> nn.Module:
    return LiteEncoder(schedule, num_layers=6, layer_cfg=layer_cfg(ffn), **kwargs)


def gflops(encoder: nn.Module, sizes=None) -> float:
    sizes = sizes or pyramid_sizes(PUBLISHED_SIZE)
    return count_flops(encoder.eval(), **encoder_inputs(sizes)).total / 1e9


@pytest.mark.parametrize(
    ('encoder', 'published'),
    [
        (stock, 144.34),
        (lite, 58.65),
        (lambda: lite(key_aware=False), 54.66),
        (lambda: lite(small_ffn=False), 96.94),
    ],
    ids=['stock', 'lite', 'lite without KDA', 'lite without small FFN'],
)
def test_measured_encoder_gflops(encoder, published):
    """What the released implementation was measured at, to the last digit given."""
    assert gflops(encoder()) == pytest.approx(published, abs=0.006)


def formula(schedule: tuple[int, int, int, int], sizes, key_aware: bool, ffn: int) -> int:
    """A second derivation of the count, by hand, for joint updates with the small FFN."""
    num_high, _, updates, blocks = schedule
    tokens = [height * width for height, width in sizes]
    high, everything = sum(tokens[-num_high:]), sum(tokens)
    points = LEVELS * POINTS
    value = everything * DIMS * DIMS
    attend = DIMS * HEADS * points * 2 + DIMS * DIMS + 2 * 5 * DIMS
    attend += (DIMS * DIMS if key_aware else DIMS * HEADS * points) + DIMS * points * (
        10 if key_aware else 4
    )
    large, small = 2 * DIMS * ffn, 2 * DIMS * DIMS
    only_high = value + high * (attend + large)
    joint = value + everything * attend + high * large + (everything - high) * small
    return blocks * ((updates - 1) * only_high + joint)


@pytest.mark.parametrize('key_aware', [True, False])
@pytest.mark.parametrize(
    'schedule', [(3, 1, 2, 3), (2, 2, 2, 3), (3, 1, 6, 1), (3, 1, 3, 2), (1, 3, 1, 6)]
)
def test_lite_encoder_matches_formula(schedule, key_aware):
    name = 'H{}L{}-({}+1)x{}'.format(*schedule)
    count = count_flops(
        lite(name, ffn=1024, key_aware=key_aware).eval(), **encoder_inputs(TINY, batch_size=1)
    )
    assert count.total == formula(schedule, TINY, key_aware, ffn=1024)


def test_batch_scales_the_count():
    encoder = lite().eval()
    one = count_flops(encoder, **encoder_inputs(TINY)).total
    assert count_flops(encoder, **encoder_inputs(TINY, batch_size=3)).total == 3 * one


def test_layers_add_up():
    count = count_flops(lite().eval(), **encoder_inputs(TINY))
    layers = [count.of(f'layers.{i}') for i in range(6)]
    assert sum(layers) == count.total == count.of('layers')
    assert layers[0] == layers[2] < layers[1] == layers[3]


@pytest.mark.parametrize('key_aware', [True, False])
def test_backend_does_not_change_the_count(key_aware):
    encoder = lite(key_aware=key_aware).eval()
    counts = set()
    for backend in ops.backends():
        if backend.available and backend.name != 'triton':
            with ops.use_backend(backend.name):
                counts.add(count_flops(encoder, **encoder_inputs(TINY)).total)
    assert counts == {formula((3, 1, 2, 3), TINY, key_aware, ffn=2048)}


def test_skipping_the_arithmetic_does_not_change_the_count():
    encoder = lite().eval()
    inputs = encoder_inputs(TINY)
    assert count_flops(encoder, **inputs).by_module == (
        count_flops(encoder, compute=True, **inputs).by_module
    )


class Zoo(nn.Module):
    """One of every operator that the rule knows, for the independent counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.bn = nn.BatchNorm2d(8)
        self.gn = nn.GroupNorm(2, 8)
        self.ln = nn.LayerNorm(8)
        self.bare_ln = nn.LayerNorm(8, elementwise_affine=False)
        self.linear = nn.Linear(8, 5)
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, image):
        x = self.up(self.grouped(self.gn(self.bn(self.conv(image)))))
        x = nn.functional.interpolate(x, scale_factor=2)
        x = nn.functional.interpolate(x, scale_factor=2, mode='bilinear')
        x = nn.functional.grid_sample(x, torch.zeros(x.shape[0], 4, 4, 2), align_corners=False)
        pooled = self.pool(x).flatten(2).transpose(1, 2)
        tokens = self.bare_ln(self.ln(x.flatten(2).transpose(1, 2)))
        attention = torch.bmm(tokens, pooled.transpose(1, 2))
        return self.linear(torch.matmul(attention, pooled)), self.linear(pooled[0])


def test_agrees_with_mmengine():
    model, image = Zoo().eval(), torch.randn(2, 3, 17, 20)
    with torch.no_grad():
        expected = FlopAnalyzer(model, (image,)).total()
    assert count_flops(model, image).total == expected


def test_agrees_with_mmengine_on_the_stock_encoder():
    inputs = encoder_inputs(TINY)
    names = list(inputs)

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = stock()

        def forward(self, *tensors):
            return self.encoder(**dict(zip(names, tensors)))

    model = Positional().eval()
    expected = FlopAnalyzer(model, tuple(inputs.values())).total()
    assert count_flops(model.encoder, **inputs).total == expected


class Attend(nn.Module):
    def forward(self, query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_fused_softmax_attention():
    query, key = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 8)
    assert count_flops(Attend(), query, key, key).total == 2 * 3 * 7 * 5 * (8 + 8)


class OneOp(nn.Module):
    def forward(self, query, value, locations):
        sizes = [(3, 4), (2, 2)]
        return ops.key_aware_deform_attn(query, value, value, sizes, locations)


def test_fused_op_in_a_traced_graph():
    """What mmdet's get_flops sees of the fused operator."""
    if not {b.name: b.available for b in ops.backends()}['cpu']:
        pytest.skip('the CPU kernels are not built, so no traced graph holds the fused operator')
    inputs = (torch.randn(2, 5, 4, 8), torch.randn(2, 16, 4, 8), torch.rand(2, 5, 4, 2, 3, 2))
    expected = deform_attn_flops(2 * 5, 4, 2 * 3, 8, key_aware=True)
    assert count_flops(OneOp(), *inputs).total == expected
    assert FlopAnalyzer(OneOp(), inputs).total() == expected


def test_shared_and_frozen_parameters():
    layer = nn.Linear(3, 4)
    layer.bias.requires_grad_(False)
    assert count_parameters(nn.ModuleList([layer, layer])) == 16


DEFORMABLE = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'


@pytest.fixture(scope='module')
def detector():
    return build_detector(load_config(DEFORMABLE)).train()


def test_detector(detector):
    report = count_detector(detector, (128, 160))
    assert report.flops == sum(report.stage_flops.values())
    assert report.params == sum(report.stage_params.values())
    assert report.level_tokens == [320, 80, 20, 6]
    assert sum(report.encoder_layer_flops) == report.stage_flops['encoder']
    assert (
        report.stage_flops['encoder']
        == count_flops(
            detector.encoder.eval(), **encoder_inputs([(16, 20), (8, 10), (4, 5), (2, 3)])
        ).total
    )
    # 40 M in the paper's table.
    assert report.params == pytest.approx(40e6, rel=0.01)
    assert detector.training


def test_lite_config_in_get_flops():
    """mmdet's tool builds the model from the config and traces it; ours gives the same figure."""
    if not {b.name: b.available for b in ops.backends()}['cpu']:
        pytest.skip('the CPU kernels are not built, so no traced graph holds the fused operator')
    config = load_config(DEFORMABLE)
    config.merge_from_dict(dict(model=lite_change(config.model, 'H3L1-(2+1)x3')))
    model = build_detector(config)
    images, samples = image_batch(1, (96, 128))
    expected = count_detector(model, (96, 128)).flops
    model.forward = partial(model.forward, data_samples=samples)
    report = get_model_complexity_info(
        model, None, inputs=images, show_table=False, show_arch=False
    )
    assert report['flops'] == expected


@pytest.mark.parametrize(
    ('name', 'lite'), [('DDQ', True), ('Mask2Former', False), ('Mask2Former', True)]
)
def test_encoder_from_its_config_alone(name, lite):
    """The same cost as inside the model."""
    config = small_config(name)
    if lite:
        change = lite_change(config.model, main_schedule(config.model))
        config.merge_from_dict(dict(model=change))
    alone = encoder_flops(config.model, (192, 256))
    inside = count_detector(build_detector(config), (192, 256))
    # The model works out which tokens are padding, and so on.
    assert inside.stage_flops['encoder'] == pytest.approx(alone, rel=1e-3)
    assert len(inside.encoder_layer_flops) == 2
    assert sum(inside.stage_flops.values()) == inside.flops
    assert inside.stage_flops['neck'] and inside.stage_flops['decoder']


def test_text_costs_less_where_fewer_tokens_are_fused():
    config = get_config('mmdet::grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py')
    stock = encoder_flops(config.model, (192, 256))
    config.merge_from_dict(dict(model=lite_change(config.model, 'H3L1-(2+1)x3')))
    assert encoder_flops(config.model, (192, 256)) < 0.6 * stock


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('dino/dino-4scale_r50_8xb2-12e_coco.py', [8, 16, 32, 64]),
        ('dino/dino-5scale_swin-l_8xb2-12e_coco.py', [4, 8, 16, 32, 64]),
        ('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', [8, 16, 32]),
    ],
)
def test_strides(name, expected):
    assert strides(get_config(f'mmdet::{name}').model, len(expected)) == expected
