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
from torch.nn.utils import prune

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


class Stem(torch.nn.Module):
    """A convolution and norms in the place of one; ``way`` says how they are connected."""

    def __init__(self, last: torch.nn.Module, way: str) -> None:
        super().__init__()
        self.conv, self.last, self.way = torch.nn.Conv2d(3, 3, 1), last, way
        self.norm, self.other = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
        self.alias = self.norm
        for norm in (self.norm, self.other):
            torch.nn.init.uniform_(norm.running_mean, 20, 60)
        for each in (self.conv, self.norm):
            if way == 'hooks':
                each.register_forward_hook(lambda module, args, output: output.abs())
            if way == 'forward':
                each.forward = lambda maps, forward=each.forward: forward(maps).abs()
        if way in ('weight_norm', 'spectral_norm'):
            getattr(torch.nn.utils, way)(self.conv)
        elif way == 'parametrized':
            torch.nn.utils.parametrizations.orthogonal(self.conv)
        elif way == 'pruned':
            prune.l1_unstructured(self.conv, 'weight', 0.5)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if self.way == 'norm first':
            return self.last(self.conv(self.norm(maps.clone()).relu()))
        found = self.conv(maps)
        if self.way == 'in place':
            found.relu_()
        normed = (self.alias if self.way == 'two names' else self.norm)(found)
        if self.way == 'another reader':
            normed = normed + found
        elif self.way == 'bias read':
            normed = normed + self.conv.bias.sum()
        elif self.way == 'another norm':
            normed = normed + self.other(found)
        elif self.way == 'twice':
            normed = self.norm(self.conv(normed))
        elif self.way == 'two norms':
            normed = self.other(self.conv(normed))
        return self.last(normed)


@pytest.mark.parametrize(
    'way',
    [
        *('norm first', 'in place', 'another reader', 'bias read', 'another norm', 'twice'),
        *('two norms', 'hooks', 'forward', 'weight_norm', 'spectral_norm', 'parametrized'),
        *('pruned', 'two names'),
    ],
)
def test_a_norm_is_folded_where_that_changes_nothing(way, detector, images):
    model, batch = detector('LiteDINO'), batch_of(images[:1])
    model.backbone.conv1 = Stem(model.backbone.conv1, way).eval()
    expected = predict(model, *batch)
    mmlite.optimize(model)
    is_folded = type(model.backbone.conv1.norm) is torch.nn.Identity
    assert is_folded == (way == 'two names')
    has_none = way == 'bias read'  # is seen by its result alone
    assert (type(model.backbone.layer1[0].bn1) is torch.nn.BatchNorm2d) == has_none
    assert_same(expected, predict(model, *batch), batch[0])
