"""Small detectors with an opinion, and images to show them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.hub import get_config
from small_detectors import SMALL

import mmlite  # noqa: F401  (registers the Lite detectors)

register_all_modules()

DINO = 'mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py'
DEFORMABLE = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
REFINE = 'mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py'
TWO_STAGE = 'mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'
SCHEDULE = dict(schedule='H3L1-(2+1)x1')


def lite(**attention) -> dict:
    return dict(type='LiteDINO', encoder=dict(**SCHEDULE, layer_cfg=dict(self_attn_cfg=attention)))


# Name -> stock config, changes to it.
DETECTORS = {
    'DINO': (DINO, {}),
    'DeformableDETR': (DEFORMABLE, {}),
    'DeformableDETR refining': (REFINE, {}),
    'DeformableDETR two-stage': (TWO_STAGE, {}),
    'HDeformableDETR': (
        TWO_STAGE,
        dict(
            type='HDeformableDETR',
            num_one2many_queries=20,
            bbox_head=dict(type='HDeformableDETRHead'),
        ),
    ),
    'LiteDINO': (DINO, lite()),
    'LiteDINO with a key of its own': (DINO, lite(proj_key=True)),
    'LiteDINO with the same locations': (DINO, lite(same_loc=True)),
    'LiteDINO with a key-aware decoder': (DINO, lite() | dict(decoder=dict(key_aware=True))),
    'LiteDeformableDETR': (TWO_STAGE, dict(type='LiteDeformableDETR', encoder=SCHEDULE)),
}


@pytest.fixture
def detector():
    """Build a detector of :data:`DETECTORS` whose parameters all matter."""

    def build(name: str) -> torch.nn.Module:
        base, changes = DETECTORS[name]
        config = get_config(base)
        config.merge_from_dict(dict(model=SMALL))
        config.merge_from_dict(dict(model=changes))
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        for module in (model.encoder, model.decoder, model.bbox_head):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
        torch.nn.init.normal_(model.level_embed)
        for branch in model.bbox_head.cls_branches:
            torch.nn.init.normal_(branch.weight, std=0.3)
        for branch in model.bbox_head.reg_branches:
            torch.nn.init.normal_(branch[-1].weight, std=0.2)
        return model.eval()

    return build


@pytest.fixture
def images():
    """Two images of different sizes, and one without anything in it."""
    random = np.random.default_rng(0)
    return [
        random.integers(0, 256, (200, 260, 3), np.uint8),
        random.integers(0, 256, (261, 210, 3), np.uint8),
        np.zeros((220, 220, 3), np.uint8),
    ]
