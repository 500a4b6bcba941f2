import copy
import json
import pickle

import pytest
import torch
from mmdet.registry import MODELS
from small_detectors import batch, small_config, small_model, without_gradient

import mmlite
from mmlite.models.lite import AnyLiteEncoder
from mmlite.nn import EncoderSchedule
from mmlite.openmmlab.families import encoder_name

LITE = {'DINO': 'LiteDINO', 'DDQ': 'LiteDDQDETR', 'Mask2Former': 'Mask2Former'}
LEVELS = {'DINO': 'H3L1', 'DDQ': 'H3L1', 'Mask2Former': 'H2L1'}


def stock_model(name: str) -> torch.nn.Module:
    """A small model with its config, as MMDetection's tools leave them."""
    model = small_model(name, std=0.05).eval()
    model.cfg = small_config(name)
    return model


def predict(model: torch.nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        found = model.eval()(**batch(model), mode='predict')[0].pred_instances
    return [found.scores, found.bboxes]


@pytest.mark.parametrize('name', LITE)
def test_every_level_in_every_layer_is_the_same_model(name):
    model = stock_model(name)
    expected = predict(model)
    lite = mmlite.to_lite(model, f'{LEVELS[name]}-(1+1)x2', key_aware=False, small_ffn=False)
    assert lite is model and type(lite).__name__ == LITE[name]
    scores, boxes = predict(lite)
    torch.testing.assert_close(scores, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(boxes, expected[1], atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize('name', LITE)
def test_trains_from_there(name):
    model = stock_model(name)
    config, before = model.cfg, json.dumps(model.cfg.model, default=str)
    schedule = EncoderSchedule.parse(f'{LEVELS[name]}-(2+1)x1')
    lite = mmlite.to_lite(model, schedule, elastic=schedule)
    assert lite.cfg.dump().count(str(schedule)) == 2
    assert without_gradient(lite, batch(lite)) == []
    assert json.dumps(config.model, default=str) == before
    # The changed config builds the same model.
    again = MODELS.build(lite.cfg.model)
    wrong = again.load_state_dict(lite.state_dict(), strict=False)
    # In training DDQ's decoder gets branches of the head, and they are in the state twice.
    assert all(name.startswith('decoder.aux_reg_branches') for names in wrong for name in names)
    with pytest.raises(ValueError, match='is Lite already'):
        mmlite.to_lite(lite, f'{LEVELS[name]}-(2+1)x1')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_takes_the_dtype_of_the_model(dtype):
    model = small_model('DINO').to(dtype)
    lite = mmlite.to_lite(model, 'H3L1-(2+1)x1')
    assert {parameter.dtype for parameter in lite.parameters()} == {dtype}
    assert lite.encoder.schedule_code.tolist() == [3, 1, 2, 1, 0]


@pytest.mark.parametrize('num_cp, kept', [(0, -1), (1, 1)])
def test_goes_on_recomputing_as_many_layers(num_cp, kept):
    model = stock_model('DINO')
    model.encoder.num_cp = num_cp
    assert mmlite.to_lite(model, 'H3L1-(2+1)x1').encoder.num_cp == kept


def test_computed_weights_are_copied_and_other_encoders_refused():
    model = stock_model('DINO')
    layer = model.encoder.layers[0]
    torch.nn.utils.weight_norm(layer.self_attn.value_proj)
    torch.nn.utils.parametrizations.weight_norm(layer.ffn.layers[1])
    expected = layer.self_attn.value_proj.weight, layer.ffn.layers[1].weight
    mmlite.to_lite(model, 'H3L1-(1+1)x2')
    layer = model.encoder.layers[0]
    for actual, wanted in zip((layer.self_attn.value_proj, layer.ffn.layers[1]), expected):
        torch.testing.assert_close(actual.weight, wanted)
    kind = type(mmlite.restore(model).encoder)
    model.encoder.__class__ = type('Mine', (kind,), {'forward': lambda *args, **kwargs: None})
    with pytest.raises(ValueError, match='has no encoder that the Lite encoder can replace'):
        mmlite.to_lite(model, 'H3L1-(1+1)x2')


@pytest.mark.parametrize('name', LITE)
def test_what_was_done_is_undone(name):
    model = stock_model(name)
    model.other = model.get_submodule(encoder_name(model))
    config, before = model.cfg, predict(model)
    kinds = {name: type(part) for name, part in model.named_modules()}
    mmlite.fuse(model)
    mmlite.to_lite(model, f'{LEVELS[name]}-(2+1)x1')
    changed = pickle.loads(pickle.dumps(copy.deepcopy(model).half())).float()
    assert model.other is model.get_submodule(encoder_name(model))
    assert any('schedule_code' in name for name in model.state_dict())
    for each in (changed, model):
        mmlite.restore(each)
        assert {name: type(part) for name, part in each.named_modules()} == kinds
        assert not any('schedule_code' in name for name in each.state_dict())
        assert each.other is each.get_submodule(encoder_name(each))
    assert model.cfg is config
    for ours, theirs in zip(predict(model), before):
        assert torch.equal(ours, theirs)
    assert next(changed.parameters()).dtype == torch.float32
    predict(changed)


def test_a_class_of_ones_own_is_changed_by_its_structure():
    model = stock_model('DINO')
    model.__class__ = type('Own', (type(model),), {})
    mmlite.to_lite(model, 'H3L1-(2+1)x1')
    assert type(model).__name__ == 'Own' and isinstance(model.encoder, AnyLiteEncoder)


def test_what_has_no_lite_variant():
    model = stock_model('DINO')
    kinds = [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match='makes 6 layers, but num_layers is 2'):
        mmlite.to_lite(model, 'H3L1-(2+1)x3')
    with pytest.raises(ValueError, match='ChannelMapper has no deformable attention of mmcv'):
        mmlite.fuse(model.neck)
    assert [type(part) for part in model.modules()] == kinds
