import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from logging import getLogger
from types import SimpleNamespace

import numpy as np
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


def test_threads_share_an_optimised_detector(detector, images):
    """Each with images of its own, some padded and some not."""
    model = mmlite.optimize(detector('LiteDINO'))
    batches = [batch_of(images), batch_of(images[:1]), batch_of(images[1:2])]
    batches.append(batch_of([images[0][:70, :150]]))

    def run(number: int) -> list:
        with torch.inference_mode():
            return predict(model, *batches[number % 4])

    expected = [run(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(run, range(16))):
            for one, other in zip(expected[number % 4], found):
                for right, array in zip(one, other):
                    np.testing.assert_allclose(array, right, atol=1e-4)


def test_a_norm_that_runs_before_its_convolution_is_not_folded(detector, images):
    class NormFirst(torch.nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 3, 1)
            self.conv, self.norm = conv, torch.nn.BatchNorm2d(3)  # registered after, run before
            torch.nn.init.uniform_(self.norm.running_mean, 20, 60)

        def forward(self, maps):
            return self.conv(self.norm(self.first(maps).relu()))

    model = detector('LiteDINO')
    model.backbone.conv1 = NormFirst(model.backbone.conv1).eval()
    batch = batch_of(images[:1])
    expected = predict(model, *batch)
    mmlite.optimize(model)
    assert type(model.backbone.conv1.norm) is torch.nn.BatchNorm2d
    assert_same(expected, predict(model, *batch), batch[0])


def test_all_or_nothing(detector, monkeypatch):
    model = detector('LiteDINO').train()
    before = {name: (type(m), m.training) for name, m in model.named_modules()}
    state = {name: id(value) for name, value in model.named_parameters()}
    monkeypatch.setattr('mmlite.export.inference._predict', None)  # what is set last
    with pytest.raises(TypeError):
        mmlite.optimize(model)
    assert {name: (type(m), m.training) for name, m in model.named_modules()} == before
    assert {name: id(value) for name, value in model.named_parameters()} == state
