"""A built stock model becomes Lite, and keeps what it knows."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config

import mmlite
from mmlite.openmmlab.checkpoints import warm_start

register_all_modules()


@pytest.fixture(autouse=True)
def scope():
    """Whatever a runner of another test has left as the default scope."""
    register_all_modules()


FFN = dict(ffn_cfg=dict(feedforward_channels=32))
SMALL = dict(
    backbone=dict(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1),
    encoder=dict(num_layers=2, layer_cfg=FFN),
    decoder=dict(num_layers=2, layer_cfg=FFN),
    bbox_head=dict(num_classes=5),
    num_queries=20,
    test_cfg=dict(max_per_img=10),
)
DETECTORS = {
    'dino/dino-4scale_r50_8xb2-12e_coco.py': 'LiteDINO',
    'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py': 'LiteDDQDETR',
}
MASK2FORMER = 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'


def stock_model(name: str) -> tuple[torch.nn.Module, Config]:
    config = get_config(f'mmdet::{name}')
    if name == MASK2FORMER:
        head = dict(
            in_channels=[8, 16, 32, 64],
            num_queries=20,
            pixel_decoder=dict(encoder=SMALL['encoder']),
            transformer_decoder=SMALL['decoder'],
        )
        model = dict(
            data_preprocessor=dict(batch_augments=None),
            backbone=SMALL['backbone'],
            panoptic_head=head,
        )
    else:
        model = {**SMALL, 'neck': dict(in_channels=[16, 32, 64])}
    config.merge_from_dict(dict(model=model))
    torch.manual_seed(0)
    built = MODELS.build(config.model)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return built.eval(), config


def batch(model) -> dict:
    packed = demo_mm_inputs(1, [(3, 96, 128)], num_items=[3], num_classes=5, with_mask=True)
    return model.data_preprocessor(packed, training=False)


@pytest.mark.parametrize('name', [*DETECTORS, MASK2FORMER])
def test_every_level_in_every_layer_is_the_same_model(name):
    model, _ = stock_model(name)
    levels = 'H2L1' if name == MASK2FORMER else 'H3L1'
    with torch.no_grad():
        expected = model(**batch(model), mode='predict')[0].pred_instances
    lite = mmlite.to_lite(model, f'{levels}-(1+1)x2', key_aware=False, small_ffn=False)
    assert lite is model
    if name in DETECTORS:
        assert type(lite).__name__ == DETECTORS[name]
    with torch.no_grad():
        actual = lite(**batch(lite), mode='predict')[0].pred_instances
    torch.testing.assert_close(actual.scores, expected.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(actual.bboxes, expected.bboxes, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize('name', [*DETECTORS, MASK2FORMER])
def test_trains_from_there(name):
    model, config = stock_model(name)
    model.cfg = config
    before = json.dumps(config.model, default=str)
    levels = 'H2L1' if name == MASK2FORMER else 'H3L1'
    lite = mmlite.to_lite(model, f'{levels}-(2+1)x1').train()
    packed = demo_mm_inputs(1, [(3, 96, 128)], num_items=[3], num_classes=5, with_mask=True)
    losses = lite(**lite.data_preprocessor(packed, training=True), mode='loss')
    lite.parse_losses(losses)[0].backward()
    unused = [name for name, p in lite.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    assert json.dumps(config.model, default=str) == before
    # The changed config builds the same model.
    again = MODELS.build(lite.cfg.model)
    wrong = again.load_state_dict(lite.state_dict(), strict=False)
    # In training DDQ's decoder gets branches of the head, and they are in the state twice.
    assert all(name.startswith('decoder.aux_reg_branches') for names in wrong for name in names)
    with pytest.raises(ValueError, match='is Lite already'):
        mmlite.to_lite(lite, f'{levels}-(2+1)x1')


@pytest.mark.parametrize('name', ['ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', MASK2FORMER])
def test_warm_start_fits_the_new_families(name):
    model, config = stock_model(name)
    model.cfg = config
    levels = 'H2L1' if name == MASK2FORMER else 'H3L1'
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    lite = mmlite.to_lite(model, f'{levels}-(2+1)x1')
    done = warm_start(lite, lite.cfg.model, stock, batch(model))
    assert done.fitted and all('encoder.layers' in name for name in done.fitted)
    assert done.result.memory < done.copied_only.memory


@pytest.mark.parametrize('name', [*DETECTORS, MASK2FORMER])
def test_what_was_done_is_undone(name):
    model, config = stock_model(name)
    model.cfg = config
    kinds = {name: type(part) for name, part in model.named_modules()}
    data = batch(model)

    def predict(model):
        with torch.no_grad():
            found = model(**copy.deepcopy(data), mode='predict')[0].pred_instances
        return found.bboxes, found.scores

    before = predict(model)
    levels = 'H2L1' if name == MASK2FORMER else 'H3L1'
    mmlite.fuse(model)
    mmlite.to_lite(model, f'{levels}-(2+1)x1')
    changed = pickle.loads(pickle.dumps(copy.deepcopy(model).half())).float()
    names = list(model.state_dict())
    assert any('schedule_code' in name for name in names)
    for each in (changed, model):
        mmlite.restore(each)
        assert {name: type(part) for name, part in each.named_modules()} == kinds
        assert not any('schedule_code' in name for name in each.state_dict())
    assert model.cfg is config
    for ours, theirs in zip(predict(model), before):
        assert torch.equal(ours, theirs)
    assert next(changed.parameters()).dtype == torch.float32
    predict(changed)


def test_what_has_no_lite_variant():
    with pytest.raises(ValueError, match='Linear is a model of neither'):
        mmlite.to_lite(torch.nn.Linear(1, 1), 'H3L1-(2+1)x3')
    with pytest.raises(ValueError, match='Linear is a model of neither'):
        mmlite.fuse(torch.nn.Linear(1, 1))
    other = get_config('mmdet::detr/detr_r50_8xb2-150e_coco.py').model  # one map
    other.backbone.init_cfg = None
    other = MODELS.build(other)
    with pytest.raises(ValueError, match='DETR has no Lite variant'):
        mmlite.to_lite(other, 'H3L1-(2+1)x3')
    with pytest.raises(ValueError, match='DETR has no deformable attention'):
        mmlite.fuse(other)
    model, _ = stock_model('dino/dino-4scale_r50_8xb2-12e_coco.py')
    kinds = [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match='makes 6 layers, but num_layers is 2'):
        mmlite.to_lite(model, 'H3L1-(2+1)x3')
    assert [type(part) for part in model.modules()] == kinds


def test_importing_stays_light():
    code = 'import sys, mmlite; print([name in sys.modules for name in ("torch", "mmdet")])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[False, False]', done.stderr
    with pytest.raises(AttributeError):
        mmlite.to_litte  # noqa: B018
