"""The encoder's cost from its config alone: the same as inside the model."""

from __future__ import annotations

import pytest
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config

from mmlite.analysis.complexity import count_detector, encoder_flops, strides
from mmlite.openmmlab.build import build_detector
from mmlite.openmmlab.checkpoints import lite_change

register_all_modules()
SIZE = (192, 256)


@pytest.mark.parametrize(
    ('name', 'schedule'),
    [
        ('ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', 'H3L1-(2+1)x3'),
        ('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', None),
        ('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', 'H2L1-(2+1)x3'),
    ],
)
def test_as_in_the_model(name, schedule):
    config = get_config(f'mmdet::{name}')
    config.merge_from_dict(dict(model=dict(num_queries=100))) if 'ddq' in name else None
    if schedule:
        config.merge_from_dict(dict(model=lite_change(config.model, schedule)))
    alone = encoder_flops(config.model, SIZE)
    inside = count_detector(build_detector(Config(config.to_dict())), SIZE)
    # The model works out which tokens are padding, and so on.
    assert inside.stage_flops['encoder'] == pytest.approx(alone, rel=1e-3)
    assert len(inside.encoder_layer_flops) == 6
    assert sum(inside.stage_flops.values()) == inside.flops
    assert inside.stage_flops['neck'] and inside.stage_flops['decoder']


def test_text_costs_less_where_fewer_tokens_are_fused():
    config = get_config('mmdet::grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py')
    stock = encoder_flops(config.model, SIZE)
    config.merge_from_dict(dict(model=lite_change(config.model, 'H3L1-(2+1)x3')))
    assert encoder_flops(config.model, SIZE) < 0.6 * stock


def test_strides():
    def of(name):
        return get_config(f'mmdet::{name}').model

    assert strides(of('dino/dino-4scale_r50_8xb2-12e_coco.py'), 4) == [8, 16, 32, 64]
    assert strides(of('dino/dino-5scale_swin-l_8xb2-12e_coco.py'), 5) == [4, 8, 16, 32, 64]
    mask2former = of('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py')
    assert strides(mask2former, 3) == [8, 16, 32]
