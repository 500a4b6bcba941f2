import copy
import pickle

import pytest
import torch
from torch import nn

from mmlite.models import changing, restore


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))).eval()


def change(model: nn.Module) -> None:
    with changing(model, 'test') as record:
        record.set(model, '0', '__class__', Doubled)
        record.set(model, '1', '0', nn.Linear(3, 3, bias=False).eval())
        record.set(model, '1.0', 'bias', nn.Parameter(torch.ones(3)))
        record.set(model, '', 'note', 'changed')


def test_nothing_is_seen_of_the_record_and_all_is_undone(model):
    x = torch.randn(2, 3)
    before, state = model(x), model.state_dict()
    kinds, old = [type(part) for part in model.modules()], model[1][0]
    change(model)
    assert not torch.equal(model(x), before) and model.note == 'changed'
    assert list(model.state_dict()) == list(state)
    assert len(list(model.parameters())) == 4
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert restore(each) is each
        assert torch.equal(each(x), before)
        assert [type(part) for part in each.modules()] == kinds and not hasattr(each, 'note')
        assert {**each.__dict__}.keys() == nn.Sequential().__dict__.keys()
    assert model[1][0] is old
    assert torch.equal(restore(model)(x), before)


def test_the_last_change_is_undone_first(model):
    change(model)
    first = type(model[0])
    with changing(model, 'again') as record:
        record.set(model, '0', '__class__', nn.Linear)
        record.set(model, '', 'note', 'again')
    restore(model, last=True)
    assert type(model[0]) is first and model.note == 'changed'
    restore(model)
    assert type(model[0]) is nn.Linear and not hasattr(model, 'note')


def test_all_or_nothing(model):
    x = torch.randn(2, 3)
    before = model(x)
    with pytest.raises(RuntimeError), changing(model, 'test') as record:
        record.set(model, '0', '__class__', Doubled)
        record.set(model, '1', '0', nn.Identity())
        raise RuntimeError('in the middle')
    assert torch.equal(model(x), before)
    with changing(model, 'nothing'):
        pass
    assert vars(model).keys() == vars(nn.Sequential()).keys()


def test_what_was_kept_follows_dtype_and_mode(model):
    model.append(nn.BatchNorm1d(3).eval())
    mean, count = model[2].running_mean, model[2].num_batches_tracked
    change(model)
    with changing(model, 'tensors') as record:
        record.set(model, '0', 'weight', nn.Parameter(torch.ones(3, 3)))
        record.set(model, '2', 'running_mean', torch.ones(3))
        record.set(model, '2', 'num_batches_tracked', None)
    model.double().train()
    restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model[2].running_mean is mean and mean.dtype == torch.float64 and not mean.any()
    assert model[2].num_batches_tracked is count and count.dtype == torch.int64
    assert all(part.training for part in model.modules())
