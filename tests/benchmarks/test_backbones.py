import torch
from mmdet.registry import MODELS

from benchmarks.backbones import BACKBONES, STOCK, VIT
from mmlite.openmmlab.build import load_config


def test_simple_pyramid_halves_from_map_to_map():
    """Of a map whose sides are odd; its config is that of the ViT's detector."""
    config = load_config(STOCK)
    config.merge_from_dict(BACKBONES[VIT])
    assert config.model.backbone.type == 'TimmBackbone' and 'depth' not in config.model.backbone
    maps = MODELS.build(config.model.neck)((torch.zeros(1, 384, 5, 7),))
    assert [tuple(x.shape[1:]) for x in maps] == [
        *((256, 10, 14), (256, 5, 7)),
        *((256, 2, 3), (256, 1, 2)),
    ]
