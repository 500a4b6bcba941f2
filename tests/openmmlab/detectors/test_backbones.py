"""The shipped detector with a backbone of MMPretrain, in small."""

from __future__ import annotations

from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from small_detectors import SMALL, batch, without_gradient

CONFIGS = Path(__file__).parents[3] / 'configs'


def test_convnext(mmpretrain):
    name = 'lite_dino/lite-dino-4scale_convnext-t_h3l1-2p1x3_8xb2-12e_coco.py'
    config = Config.fromfile(CONFIGS / name)
    shrunk = {key: value for key, value in SMALL.items() if key not in ('backbone', 'neck')}
    config.merge_from_dict(dict(model=shrunk))
    config.model.encoder.schedule = 'H3L1-(2+1)x1'
    config.model.backbone.arch = dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32])
    config.model.backbone.update(drop_path_rate=0.0, init_cfg=None)
    config.model.neck.in_channels = [16, 24, 32]
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    data = batch(model)
    maps = model.backbone(data['inputs'])
    assert [tuple(each.shape[1:]) for each in maps] == [(16, 16, 16), (24, 8, 8), (32, 4, 4)]
    assert without_gradient(model, data) == []
    with torch.no_grad():
        results = model.eval()(**data, mode='predict')
    assert results[0].pred_instances.bboxes.isfinite().all()
