"""Lite detectors inside what MMDetection wraps around a detector."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from small_detectors import SMALL

import mmlite
from mmlite.openmmlab.checkpoints import lite_change

register_all_modules()
SEMI = """
_base_ = 'mmdet::{base}'
custom_imports = dict(imports=['mmlite'])
detector = _base_.model
model = dict(
    _delete_=True,
    type='SemiBaseDetector',
    detector=detector,
    data_preprocessor=dict(
        type='MultiBranchDataPreprocessor', data_preprocessor=detector.data_preprocessor
    ),
    semi_train_cfg=dict(freeze_teacher=True, cls_pseudo_thr=0.0, unsup_weight=4.0),
    semi_test_cfg=dict(predict_on='teacher'),
)
"""
SEMI_BASES = {
    'dino/dino-4scale_r50_8xb2-12e_coco.py': 'LiteDINO',
    'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py': 'LiteDDQDETR',
}


def images(branch: str) -> dict:
    packed = demo_mm_inputs(1, [(3, 96, 128)], num_items=[3], num_classes=5)
    for sample in packed['data_samples']:
        sample.set_metainfo(dict(homography_matrix=np.eye(3, dtype=np.float32)))
    return {
        'inputs': {branch: packed['inputs']},
        'data_samples': {branch: packed['data_samples']},
    }


@pytest.mark.parametrize('base', SEMI_BASES)
def test_semi_supervised(tmp_path, base):
    path = tmp_path / 'semi.py'
    path.write_text(SEMI.format(base=base))
    config = Config.fromfile(path)
    config.merge_from_dict(dict(model=dict(detector=SMALL)))
    config.merge_from_dict(dict(model=lite_change(config.model, 'H3L1-(2+1)x1')))
    assert config.model.detector.type == SEMI_BASES[base]
    before = copy.deepcopy(config.model)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    assert config.model == before  # so that the runner can write it down and build it again
    model.init_weights()
    batches = [images(branch) for branch in ('sup', 'unsup_teacher', 'unsup_student')]
    data = {
        part: {name: value for batch in batches for name, value in batch[part].items()}
        for part in ('inputs', 'data_samples')
    }
    losses = model.train()(**model.data_preprocessor(data, training=True), mode='loss')
    assert {name.partition('_')[0] for name in losses} == {'sup', 'unsup'}
    model.parse_losses(losses)[0].backward()
    trained = dict(model.student.named_parameters())
    assert [n for n, p in trained.items() if p.requires_grad and p.grad is None] == []
    with pytest.raises(ValueError, match="take the detector inside, its 'student'"):
        mmlite.to_lite(model, 'H3L1-(2+1)x1')
