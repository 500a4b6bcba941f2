from __future__ import annotations

import pytest
import torch
from mmdet.registry import MODELS

from mmlite.openmmlab.checkpoints import stock_config

DINO = 'dino/dino-4scale_r50_8xb2-12e_coco.py'


def test_at_256_channels_it_is_dino(small_model, randomise, batch):
    stock = randomise(small_model(DINO))
    narrow = small_model(DINO, type='NarrowDINO')
    narrow.load_state_dict(stock.state_dict())
    losses = []
    for model in (stock, narrow):
        torch.manual_seed(0)
        losses.append(model.train()(**batch(model, True), mode='loss'))
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        torch.testing.assert_close(losses[1][name], losses[0][name])


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
def test_runs_at_64_channels(small_model, batch, lite):
    changes = dict(NARROW, type='NarrowDINO')
    if lite:
        changes['type'] = 'LiteNarrowDINO'
        changes['encoder'] = dict(schedule='H3L1-(2+1)x1', **NARROW['encoder'])
    model = small_model(DINO, **changes)
    loss, _ = model.parse_losses(model.train()(**batch(model, False), mode='loss'))
    loss.backward()
    assert model.decoder.ref_point_head.layers[0].weight.grad.abs().sum() > 0


def test_the_stock_detector_behind_it_is_narrow():
    model = dict(
        type='LiteNarrowDINO',
        encoder=dict(schedule='H3L1-(2+1)x1', num_layers=2, layer_cfg=dict()),
        decoder=dict(layer_cfg=dict()),
    )
    from mmengine.config import ConfigDict

    found = stock_config(ConfigDict(model))
    assert MODELS.get(found.type).__name__ == 'NarrowDINO'
