"""MMSegmentation's Mask2Former as a user meets it: semantic maps of the drawn shapes."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import commands
import pytest
import torch
from mmdet_tools import RUNS, run_python
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

import mmlite
from mmlite.datasets import generate_shapes
from mmlite.openmmlab.build import build_detector, load_config
from mmlite.openmmlab.checkpoints import load_checkpoint, stock_config
from mmlite.openmmlab.lite_config import lite_change, lite_config

mmseg = pytest.importorskip('mmseg')
STOCK = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
CONFIGS = Path(__file__).parents[2] / 'configs'
SMALL = CONFIGS / 'small/lite-mask2former-semantic_r18_h2l1-3p1x1_1xb8-20e_shapes.py'
EVERY_LEVEL = dict(schedule='H2L1-(1+1)x3', key_aware=False, small_ffn=False)


@pytest.fixture(autouse=True)
def scope():
    """MMSegmentation's scope stays within this file."""
    yield
    init_default_scope('mmdet')


def test_lite_config_and_back(tmp_path):
    stock, path = get_config(STOCK), tmp_path / 'lite.py'
    path.write_text(lite_config(stock, STOCK, 'H2L1-(2+1)x3'))
    lite = Config.fromfile(path)
    assert lite.custom_imports.imports == ['mmdet.models', 'mmlite']
    assert lite.model.decode_head.pixel_decoder.type == 'mmdet.LiteMSDeformAttnPixelDecoder'
    shipped = (
        CONFIGS / 'lite_mask2former/lite-mask2former_r50_h2l1-2p1x3_8xb2-160k_ade20k-512x512.py'
    )
    assert Config.fromfile(shipped).model == lite.model
    found = stock_config(lite.model)
    found.pop('_scope_')
    assert found == stock.model


def predict(model):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        return torch.stack([found.seg_logits.data for found in model.predict(images)])


def test_verbs():
    config = load_config(str(SMALL))
    config.model = stock_config(config.model)
    model = build_detector(config)
    names, expected = set(model.state_dict()), predict(model)
    for change in (lambda: mmlite.fuse(model), lambda: mmlite.to_lite(model, **EVERY_LEVEL)):
        change()
        assert names <= set(model.state_dict())
        torch.testing.assert_close(predict(model), expected, rtol=0, atol=1e-5)
        mmlite.restore(model)
        assert torch.equal(predict(model), expected)
    mmlite.to_lite(model, 'H2L1-(3+1)x1')
    assert not torch.allclose(predict(model), expected, atol=1e-5)
    lite = copy.deepcopy(config)
    lite.merge_from_dict({'model': lite_change(config.model, 'H2L1-(3+1)x1')})
    built = build_detector(lite)
    built.load_state_dict(model.state_dict())
    assert torch.equal(predict(built), predict(model))


def test_train_test_and_convert(tmp_path):
    """Trained and tested by MMSegmentation's own tools; its stock weights become Lite ones."""
    generate_shapes(tmp_path / 'data/shapes', {'train': 4, 'val': 2})
    config, stock, lite = (tmp_path / name for name in ('lite.py', 'stock.pth', 'lite.pth'))
    config.write_text(
        f'_base_ = {str(SMALL)!r}\n'
        'train_dataloader = dict(batch_size=2)\n'
        'train_cfg = dict(max_epochs=1, val_interval=1)\n'
    )
    content = load_config(str(config))
    content.model = stock_config(content.model)
    built = build_detector(content)
    torch.save({'state_dict': built.state_dict()}, stock)

    images = tmp_path / 'data/shapes/train'
    arguments = ('convert', stock, lite, '--from-stock', config, '--images', images)
    fit = ('--iterations', 0, '--json', tmp_path / 'report.json')
    for more in (fit, ('--iterations', 2, '--batch-size', 2)):
        commands.mmlite(*arguments, *more)
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['result']['memory'] < report['copied_only']['memory']
    content = load_checkpoint(lite)
    assert content['meta']['distilled']['iterations'] == 2

    tools = Path(mmseg.__path__[0]) / '.mim/tools'
    runs = [
        [tools / 'train.py', config, '--work-dir', 'trained'],
        [tools / 'test.py', config, lite, '--work-dir', 'converted'],
    ]
    printed = run_python(
        '-c', RUNS, json.dumps([list(map(str, run)) for run in runs]), cwd=tmp_path
    )
    assert len(re.findall(r'aAcc: [0-9.]+ +mIoU: [0-9.]+', printed)) == 2, printed
    trained = load_checkpoint(tmp_path / 'trained/epoch_1.pth')
    assert trained['meta']['iter'] == 2
    assert trained['state_dict'].keys() == content['state_dict'].keys()
