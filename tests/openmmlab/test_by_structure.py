"""``type='ToLite'``: in a config, detectors that mmlite has no Lite class of."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from mmdet.models import DINO
from mmdet.registry import MODELS
from mmengine.runner import Runner
from small_detectors import batch, small_config

from mmlite.datasets import generate_shapes
from mmlite.models.lite import AnyLiteEncoder
from mmlite.openmmlab.build import load_config
from mmlite.openmmlab.checkpoints import load_checkpoint

SMALL = Path(__file__).parents[2] / 'configs/_base_/dino-4scale_r18_1xb8-14e_shapes.py'


@MODELS.register_module()
class OwnDINO(DINO):
    """Known to its repository alone, as H-DINO is."""


def initialised(copies: bool = False, **changes) -> torch.nn.Module:
    config = small_config('DINO').model
    config.update(changes)
    torch.manual_seed(0)
    model = MODELS.build(config)
    if copies:
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.manual_seed(1)
    model.init_weights()
    return model.eval()


def test_it_starts_as_the_stock_detector():
    outputs, every_level = [], dict(schedule='H3L1-(1+1)x2', key_aware=False, small_ffn=False)
    lite = dict(type='ToLite', stock='OwnDINO', lite=every_level)
    for changes in (dict(type='OwnDINO'), lite, dict(**lite, copies=True)):
        model = initialised(**changes)
        assert type(model) is OwnDINO
        with torch.no_grad():
            outputs.append(model(**batch(model), mode='predict')[0].pred_instances)
    assert isinstance(model.encoder, AnyLiteEncoder)
    for found in outputs[1:]:
        torch.testing.assert_close(found.scores, outputs[0].scores)
        torch.testing.assert_close(found.bboxes, outputs[0].bboxes, rtol=1e-4, atol=1e-2)


def test_it_trains_resumes_and_is_tested_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate_shapes('data/shapes', {'train': 4, 'val': 2})

    def runner(epochs: int, **changes) -> Runner:
        model = dict(type='ToLite', stock='OwnDINO', lite=dict(schedule='H3L1-(3+1)x1'))
        loop = dict(max_epochs=epochs, val_interval=epochs)
        changes.update(model=model, train_cfg=loop, work_dir='trained')
        return Runner.from_cfg(load_config(str(SMALL), changes))

    runner(1).train()
    resumed = runner(2, resume=True)
    resumed.train()
    before, after = load_checkpoint('trained/epoch_1.pth')['state_dict'], resumed.model.state_dict()
    assert resumed.iter == 2
    # The optimizer has the Lite encoder.
    new = [n for n in before if '.query_proj.' in n]
    assert new and not any(torch.equal(after[n], before[n]) for n in new)
    tested = runner(2, load_from='trained/epoch_2.pth')
    assert tested.test() == pytest.approx(resumed.val())
    assert all(torch.equal(value, after[n]) for n, value in tested.model.state_dict().items())
