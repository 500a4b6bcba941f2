"""Counts against closed formulas, published measurements and an independent counter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from small_detectors import small_config
from torch import nn

from mmlite import ops
from mmlite.analysis.complexity import (
    count_detector,
    count_flops,
    deform_attn_flops,
    encoder_call,
    stage_of,
)
from mmlite.analysis.inputs import encoder_inputs, image_batch, pyramid_sizes
from mmlite.openmmlab.build import build_detector, load_config
from mmlite.openmmlab.families import encoder_name
from mmlite.openmmlab.layers import LiteEncoder
from mmlite.openmmlab.lite_config import lite_change, main_schedule

DIMS, HEADS, LEVELS, POINTS = 256, 8, 4, 4
PUBLISHED_SIZE = (850, 1040)
TINY = [(6, 8), (3, 4), (2, 2), (1, 1)]
DEFORMABLE = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'

needs_kernels = pytest.mark.skipif(
    not {b.name: b.available for b in ops.backends()}['cpu'],
    reason='the CPU kernels are not built, so no traced graph holds the fused operator',
)


def layer_cfg(ffn: int = 2048) -> dict:
    return {
        'self_attn_cfg': {'embed_dims': DIMS, 'num_levels': LEVELS, 'batch_first': True},
        'ffn_cfg': {'embed_dims': DIMS, 'feedforward_channels': ffn},
    }


def stock() -> nn.Module:
    return DeformableDetrTransformerEncoder(num_layers=6, layer_cfg=layer_cfg()).eval()


def lite(schedule: str = 'H3L1-(2+1)x3', ffn: int = 2048, **kwargs) -> nn.Module:
    return LiteEncoder(schedule, num_layers=6, layer_cfg=layer_cfg(ffn), **kwargs).eval()


@pytest.mark.parametrize(
    ('encoder', 'published'),
    [
        (stock, 144.34),
        (lite, 58.65),
        (partial(lite, key_aware=False), 54.66),
        (partial(lite, small_ffn=False), 96.94),
    ],
    ids=['stock', 'lite', 'lite without KDA', 'lite without small FFN'],
)
def test_measured_encoder_gflops(encoder, published):
    """What the released implementation was measured at, to the last digit given."""
    counted = count_flops(encoder(), **encoder_inputs(pyramid_sizes(PUBLISHED_SIZE))).total
    assert counted / 1e9 == pytest.approx(published, abs=0.006)


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
    encoder = lite('H{}L{}-({}+1)x{}'.format(*schedule), ffn=1024, key_aware=key_aware)
    expected = formula(schedule, TINY, key_aware, ffn=1024)
    assert count_flops(encoder, **encoder_inputs(TINY)).total == expected
    assert count_flops(encoder, **encoder_inputs(TINY, batch_size=3)).total == 3 * expected


@pytest.mark.parametrize('key_aware', [True, False])
def test_a_schedule_that_names_its_layers_is_counted_layer_by_layer(key_aware):
    """What a layer costs is the paper's layer over the maps that it updates and reads."""
    named = 'H4L0-1:1+12:12+12+123:123+1234x2'
    found = count_flops(lite(named, ffn=1024, key_aware=key_aware), **encoder_inputs(TINY)).total
    tokens = [height * width for height, width in reversed(TINY)]  # the smallest first
    expected = 0
    for updated, read in ((1, 1), (2, 2), (2, 4), (3, 3), (4, 4), (4, 4)):
        points = read * POINTS
        attend = DIMS * HEADS * LEVELS * POINTS * 2  # offsets
        attend += DIMS * DIMS + 2 * 5 * DIMS + DIMS * points * (10 if key_aware else 4)
        attend += DIMS * (DIMS if key_aware else HEADS * LEVELS * POINTS)
        expected += sum(tokens[:read]) * DIMS * DIMS
        expected += sum(tokens[:updated]) * (attend + 2 * DIMS * 1024)
    assert found == expected


@pytest.mark.parametrize('key_aware', [True, False])
def test_neither_backend_nor_arithmetic_changes_the_count(key_aware):
    encoder, inputs = lite(key_aware=key_aware), encoder_inputs(TINY)
    counts = [count_flops(encoder, compute=True, **inputs)]
    for backend in ops.backends():
        if backend.available and backend.name != 'triton':
            with ops.use_backend(backend.name):
                counts.append(count_flops(encoder, **inputs))
    assert all(count.by_module == counts[0].by_module for count in counts)
    assert counts[0].total == formula((3, 1, 2, 3), TINY, key_aware, ffn=2048)


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


class StockEncoder(nn.Module):
    """The stock encoder, with the tensors of :func:`encoder_inputs` by their position."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = stock()

    def forward(self, *tensors):
        return self.encoder(**dict(zip(encoder_inputs(TINY), tensors)))


class OneOp(nn.Module):
    def forward(self, query, value, locations):
        sizes = [(3, 4), (2, 2)]
        return ops.key_aware_deform_attn(query, value, value, sizes, locations)


@pytest.mark.parametrize(
    ('module', 'inputs'),
    [
        (Zoo, (torch.ones(2, 3, 17, 20),)),
        (StockEncoder, tuple(encoder_inputs(TINY).values())),
        pytest.param(
            OneOp,
            (torch.ones(2, 5, 4, 8), torch.ones(2, 16, 4, 8), torch.rand(2, 5, 4, 2, 3, 2)),
            marks=needs_kernels,
        ),
    ],
)
def test_agrees_with_mmengine(module, inputs):
    model = module().eval()
    with torch.no_grad():
        expected = FlopAnalyzer(model, inputs).total()
    assert count_flops(model, *inputs).total == expected
    if module is OneOp:
        assert expected == deform_attn_flops(2 * 5, 4, 2 * 3, 8, key_aware=True)


class Attend(nn.Module):
    def forward(self, query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_fused_softmax_attention():
    query, key = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 8)
    assert count_flops(Attend(), query, key, key).total == 2 * 3 * 7 * 5 * (8 + 8)


def test_detector():
    detector = build_detector(load_config(DEFORMABLE)).train()
    report = count_detector(detector, (128, 160))
    assert detector.training
    assert report.flops == sum(report.stage_flops.values())
    assert report.params == pytest.approx(40e6, rel=0.01)  # in the paper's table
    assert report.level_tokens == [320, 80, 20, 6]
    inputs = encoder_inputs([(16, 20), (8, 10), (4, 5), (2, 3)])
    assert report.stage_flops['encoder'] == count_flops(detector.encoder.eval(), **inputs).total


@needs_kernels
def test_lite_config_in_get_flops():
    """mmdet's tool builds the model from the config and traces it; ours gives the same figure."""
    config = load_config(DEFORMABLE)
    config.merge_from_dict(dict(model=lite_change(config.model, 'H3L1-(2+1)x3')))
    model = build_detector(config)
    images, samples = image_batch(1, (96, 128))
    expected = count_detector(model, (96, 128)).flops
    model.forward = partial(model.forward, data_samples=samples)
    options = {'inputs': images, 'show_table': False, 'show_arch': False}
    assert get_model_complexity_info(model, None, **options)['flops'] == expected


@pytest.mark.parametrize('name', ['DDQ', 'Mask2Former'])
def test_encoder_by_its_call_alone(name):
    """The same cost as inside the model, stock and Lite."""
    config = small_config(name)
    change = lite_change(config.model, main_schedule(config.model))
    call = encoder_call(build_detector(config), (192, 256))
    for lite in (False, True):
        config.merge_from_dict(dict(model=change) if lite else {})
        model = build_detector(config)
        inside = count_detector(model, (192, 256))
        alone = count_flops(model.get_submodule(encoder_name(model)).eval(), **call).total
        # The model works out which tokens are padding, and so on.
        assert inside.stage_flops['encoder'] == pytest.approx(alone, rel=1e-3)
        assert sum(inside.stage_flops.values()) == inside.flops
        assert inside.stage_flops['neck'] and inside.stage_flops['decoder']


@pytest.mark.parametrize(
    ('name', 'encoder', 'stage'),
    [
        ('encoder_of_another', 'encoder', 'other'),
        ('panoptic_head.pixel_decoder.mask_feature', 'panoptic_head.pixel_decoder.encoder', 'neck'),
        ('panoptic_head.transformer_decoder', None, 'decoder'),
        ('panoptic_head.cls_embed', None, 'head'),
        ('model.input_proj_vision.0', 'model.encoder', 'neck'),
        ('model.pixel_level_module.encoder', 'model.pixel_level_module.decoder', 'backbone'),
        ('layers.0', '', 'encoder'),
    ],
)
def test_stage(name, encoder, stage):
    assert stage_of(name, encoder) == stage
