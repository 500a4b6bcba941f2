from __future__ import annotations

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from small_detectors import batch, losses, small_model

import benchmarks.study.narrow_dino  # noqa: F401  (registers it)
from mmlite.openmmlab.checkpoints import stock_config


def test_at_256_channels_it_is_dino():
    stock, narrow = small_model('DINO', std=0.05), small_model('DINO', type='NarrowDINO')
    narrow.load_state_dict(stock.state_dict())
    expected, actual = (losses(model, batch(model)) for model in (stock, narrow))
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


NARROW = dict(
    neck=dict(out_channels=64),
    positional_encoding=dict(num_feats=32),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(embed_dims=64), ffn_cfg=dict(embed_dims=64))),
    decoder=dict(
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=64),
            cross_attn_cfg=dict(embed_dims=64),
            ffn_cfg=dict(embed_dims=64),
        )
    ),
    bbox_head=dict(embed_dims=64),
)


@pytest.mark.parametrize('lite', [False, True])
def test_runs_at_64_channels(lite):
    changes = dict(NARROW, type='NarrowDINO')
    if lite:
        changes['type'] = 'LiteNarrowDINO'
        changes['encoder'] = dict(schedule='H3L1-(2+1)x1', **NARROW['encoder'])
    model = small_model('DINO', **changes)
    losses(model, batch(model, False))['loss'].backward()
    assert model.decoder.ref_point_head.layers[0].weight.grad.abs().sum() > 0


def test_the_stock_detector_behind_it_is_narrow():
    model = dict(
        type='LiteNarrowDINO',
        encoder=dict(schedule='H3L1-(2+1)x1', num_layers=2, layer_cfg=dict()),
        decoder=dict(layer_cfg=dict()),
    )
    found = stock_config(ConfigDict(model))
    assert MODELS.get(found.type).__name__ == 'NarrowDINO'
