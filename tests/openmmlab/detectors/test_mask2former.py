"""The pixel decoder of Mask2Former: levels smallest first, the same numbers as MMDetection's."""

from __future__ import annotations

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from small_detectors import ENCODERS, without_gradient

from mmlite.openmmlab.detectors import LiteMSDeformAttnPixelDecoder

MASK2FORMER = 'mask2former/mask2former_{}.py'
TASKS = {
    'instance': 'r50_8xb2-lsj-50e_coco',
    'panoptic': 'r50_8xb2-lsj-50e_coco-panoptic',
    'swin': 'swin-t-p4-w7-224_8xb2-lsj-50e_coco',
}
EVERY_LEVEL = dict(schedule='H2L1-(1+1)x2', key_aware=False, small_ffn=False)


def small(config: Config) -> Config:
    head = config.model.panoptic_head
    decoder = head.transformer_decoder
    config.model.data_preprocessor.batch_augments = None  # they pad to 1024x1024
    config.model.backbone.init_cfg = None
    if config.model.backbone.type == 'ResNet':
        config.model.backbone.update(depth=18, frozen_stages=-1)
        head.in_channels = [64, 128, 256, 512]
    else:
        config.model.backbone.update(depths=[1, 1, 1, 1])
    head.pixel_decoder.encoder.num_layers = 2
    head.pixel_decoder.encoder.layer_cfg.ffn_cfg.feedforward_channels = 64
    head.num_queries = 20
    decoder.num_layers = 2
    decoder.layer_cfg.ffn_cfg.feedforward_channels = 64
    config.model.train_cfg.num_points = 512
    config.model.test_cfg.max_per_image = 10
    return config


@pytest.fixture
def mask2former(user_config):
    """A small stock Mask2Former, or with the Lite encoder where its arguments are given."""

    def build(task: str = 'instance', encoder: dict | None = None) -> torch.nn.Module:
        change = {}
        if encoder is not None:
            pixel_decoder = dict(type='LiteMSDeformAttnPixelDecoder', encoder=encoder)
            change = dict(model=dict(panoptic_head=dict(pixel_decoder=pixel_decoder)))
        config = small(user_config(f'mmdet::{MASK2FORMER.format(TASKS[task])}', **change))
        torch.manual_seed(0)
        return MODELS.build(config.model)

    return build


def batch(model: torch.nn.Module, task: str = 'instance') -> dict:
    things = model.num_things_classes
    packed = demo_mm_inputs(
        2,
        [(3, 64, 96), (3, 96, 64)],
        num_items=[3, 2],
        num_classes=things,
        with_mask=True,
        with_semantic=task == 'panoptic',
    )
    return model.data_preprocessor(packed, training=True)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    for parameter in model.panoptic_head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize('task', ['instance', 'panoptic'])
def test_stock_schedule_is_the_stock_model(mask2former, task):
    stock, lite = randomise(mask2former(task)), mask2former(task, EVERY_LEVEL)
    lite.load_state_dict(stock.state_dict())

    def losses(model):
        torch.manual_seed(0)  # the points of the mask losses are random
        losses = model.train()(**batch(model, task), mode='loss')
        sum(losses.values()).backward()
        gradient = model.panoptic_head.pixel_decoder.input_convs[0].conv.weight.grad
        return {**losses, 'gradient': gradient}

    expected, actual = losses(stock), losses(lite)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-3)

    feats = [
        torch.randn(2, c, 64 // s, 96 // s) for c, s in zip((64, 128, 256, 512), (4, 8, 16, 32))
    ]
    with torch.no_grad():
        expected = stock.panoptic_head.pixel_decoder(feats)
        actual = lite.panoptic_head.pixel_decoder(feats)
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual[1], expected[1], atol=1e-4, rtol=1e-4)


def test_low_level_map_is_the_largest_of_the_encoder(mask2former):
    encoder = mask2former(encoder=dict(schedule='H2L1-(2+1)x1')).panoptic_head.pixel_decoder.encoder
    sizes = ((2, 3), (4, 6), (8, 12))  # smallest first
    tokens = torch.randn(1, 6 + 24 + 96, 256)
    layer, _ = encoder.layers
    with torch.no_grad():
        seen = []
        hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        encoder(tokens, tokens, None, sizes, None, None)
        hook.remove()
    changed = (seen[0] != tokens).any(-1)[0]
    assert changed[:30].all() and not changed[30:].any()


@pytest.mark.parametrize('task', TASKS)
def test_trains(mask2former, task):
    model = mask2former(task, dict(schedule='H2L1-(2+1)x1'))
    model.init_weights()
    assert without_gradient(model, batch(model, task)) == []
    with torch.no_grad():
        results = model.eval()(**batch(model, task), mode='predict')
    assert results[0].pred_instances.masks.shape[1:] == (64, 96)
    if task == 'panoptic':
        assert results[0].pred_panoptic_seg.sem_seg.shape[-2:] == (64, 96)
    grid = MultiScaleDeformableAttention(num_levels=3).sampling_offsets.bias
    for layer in model.panoptic_head.pixel_decoder.encoder.layers:
        torch.testing.assert_close(layer.self_attn.sampling_offsets.bias, grid)


@pytest.mark.parametrize('encoder', ENCODERS)
def test_gradients_reach_every_parameter_of_the_encoder(mask2former, encoder):
    model = mask2former(encoder=dict(schedule='H2L1-(2+1)x1', **ENCODERS[encoder]))
    assert without_gradient(model, batch(model)) == []


def test_video_segmentation(user_config):
    stock = 'mmdet::mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019.py'
    pixel_decoder = dict(type='LiteMSDeformAttnPixelDecoder', encoder=dict(schedule='H2L1-(2+1)x3'))
    config = user_config(stock, model=dict(track_head=dict(pixel_decoder=pixel_decoder)))
    config.model.backbone.init_cfg = None
    head = MODELS.build(config.model).track_head
    assert isinstance(head.pixel_decoder, LiteMSDeformAttnPixelDecoder)
    assert str(head.pixel_decoder.encoder.schedule) == 'H2L1-(2+1)x3'


@pytest.mark.parametrize(
    ('encoder', 'message'),
    [
        (dict(), r"needs a schedule in its config: encoder=dict\(schedule='H2L1-\(2\+1\)x3'\)"),
        (dict(schedule='H3L1-(2+1)x1'), 'is for 4 feature levels, .* use H2L1'),
        (dict(schedule='H2L1-(2+1)x3'), 'makes 6 layers, but num_layers is 2'),
    ],
)
def test_schedules_that_do_not_fit(mask2former, encoder, message):
    with pytest.raises(ValueError, match=message):
        mask2former(encoder=encoder)


def test_more_levels_than_maps():
    layer_cfg = dict(self_attn_cfg=dict(num_levels=4))
    with pytest.raises(ValueError, match='encoder of 4 levels, but only 3 maps'):
        LiteMSDeformAttnPixelDecoder(
            in_channels=[8, 8, 8], encoder=dict(schedule='H3L1-(2+1)x1', layer_cfg=layer_cfg)
        )
