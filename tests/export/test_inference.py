import copy
from functools import partial
from logging import getLogger
from types import SimpleNamespace

import pytest
import torch
from exported import batch_of
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

import mmlite
from mmlite.export.compare import difference, predict
from mmlite.export.inference import OptimizeHook


def assert_same(expected, actual, images, tolerance: float = 1e-4) -> None:
    for one, other in zip(expected, actual):
        assert max(difference(one, other, images.shape[-2:])) <= tolerance


@pytest.mark.parametrize('name', ['LiteDINO', 'HDeformableDETR', 'DeformableDETR'])
def test_predictions_stay_and_it_can_be_undone(name, detector, images):
    model = detector(name)
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    batches = [batch_of(images), batch_of(images[:1])]
    expected = [predict(model, *batch) for batch in batches]
    state = copy.deepcopy(model.state_dict())
    types = [type(module) for module in model.modules()]
    model.train()

    assert mmlite.optimize(model) is model
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.backbone.modules())
    assert not model.training
    for batch, right in zip(batches, expected):
        assert_same(right, predict(model, *batch), batch[0])

    mmlite.restore(model)
    assert model.training and [type(module) for module in model.modules()] == types
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) and value.stride() == state[key].stride()
    assert_same(expected[0], predict(model.eval(), *batches[0]), batches[0][0], 0)


def test_hook_beside_averaged_weights(detector, images):
    """As ``mim test`` calls them: the averaged weights predict, optimised, and nothing is left."""
    runner = SimpleNamespace(_hooks=[], model=detector('LiteDINO'), logger=getLogger('test'))
    for hook in (ema := EMAHook(), OptimizeHook()):
        Runner.register_hook(runner, hook)
    call = partial(Runner.call_hook, runner)
    call('before_run')
    average = ema.ema_model.module
    for parameter in average.parameters():
        parameter.data.mul_(1.01)
    state = copy.deepcopy([runner.model.state_dict(), average.state_dict()])
    batch = batch_of(images[:1])
    expected = predict(average, *batch)

    call('before_test')
    call('before_test_epoch')
    call('before_test_iter', batch_idx=0, data_batch=None)
    call('before_test_iter', batch_idx=1, data_batch=None)
    assert 'predict' in vars(runner.model)
    assert_same(expected, predict(runner.model, *batch), batch[0])
    call('after_test_epoch', metrics={})
    call('after_test')
    assert 'predict' not in vars(runner.model)
    for model, before in zip((runner.model, average), state):
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_norm_with_an_activation_is_not_folded(detector):
    model = detector('LiteDINO')
    kind = type('NormAndActivation', (torch.nn.BatchNorm2d,), {})
    model.backbone.bn1.__class__ = kind
    mmlite.optimize(model)
    assert type(model.backbone.bn1) is kind
    assert type(model.backbone.layer1[0].bn1) is torch.nn.Identity
    with pytest.raises(ValueError, match='Linear cannot be'):
        mmlite.optimize(torch.nn.Linear(1, 1))
