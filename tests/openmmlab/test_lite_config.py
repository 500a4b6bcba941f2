import copy
from pathlib import Path

import pytest
import python_style_dino
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config

import mmlite
from mmlite.openmmlab import families
from mmlite.openmmlab.build import build_detector, load_config
from mmlite.openmmlab.checkpoints import fitting_schedules, lite_change, lite_config, stock_config
from mmlite.openmmlab.lite_config import main_schedule

register_all_modules()
SCHEDULE = 'H3L1-(2+1)x3'
DINO = 'dino/dino-4scale_r50_8xb2-12e_coco.py'
MASK2FORMER = 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
STOCK = {
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': SCHEDULE,
    'dino/dino-5scale_swin-l_8xb2-12e_coco.py': 'H4L1-(2+1)x3',
    'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py': SCHEDULE,
    'grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py': SCHEDULE,
    'mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365.py': SCHEDULE,
    MASK2FORMER: 'H2L1-(2+1)x3',
    'mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019.py': 'H2L1-(2+1)x3',
}


@pytest.mark.parametrize('name', STOCK)
def test_lite_and_back(tmp_path, name):
    stock, schedule = get_config(f'mmdet::{name}'), STOCK[name]
    assert main_schedule(stock.model) == schedule
    path = tmp_path / 'lite.py'
    path.write_text(lite_config(stock, f'mmdet::{name}', schedule))
    assert len(path.read_text().splitlines()) == 3
    lite = Config.fromfile(path)
    _, part, family = families.find_holder(lite.model)
    assert families.is_lite(part.type) and part.encoder.schedule == schedule
    assert issubclass(MODELS.get(family.lite), MODELS.get(family.stock))
    expected = copy.deepcopy(stock.model)
    # Recomputed activations are asked for in the stock encoder's own way.
    families.find_holder(expected)[1].encoder.pop('num_cp', None)
    found = stock_config(lite.model)
    found.pop('_scope_')  # mmengine's, in what is inherited across packages
    assert found == expected


def test_what_is_lite_alone_is_left_out():
    model = get_config(f'mmdet::{DINO}').model
    expected = copy.deepcopy(model)
    model.merge(lite_change(model, SCHEDULE))
    model.decoder.key_aware = True
    model.encoder.layer_cfg.self_attn_cfg.update(proj_key=True, same_loc=True)
    model.decoder.layer_cfg.cross_attn_cfg.update(proj_key=True, same_loc=True)
    model.bbox_head.num_pred_layer = model.dn_cfg.embed_dims = 7  # as building leaves it
    with pytest.raises(ValueError, match=r'LiteDINO is Lite already, with schedule H3L1'):
        lite_change(model, SCHEDULE)
    assert stock_config(model) == expected
    with pytest.raises(ValueError, match='DINO is no Lite detector'):
        stock_config(expected)


def test_fitting_schedules():
    model = get_config(f'mmdet::{DINO}').model
    schedules = fitting_schedules(model)
    assert schedules == [
        *('H3L1-(2+1)x3', 'H3L1-(3+1)x2', 'H3L1-(6+1)x1'),
        *('H2L2-(2+1)x3', 'H2L2-(3+1)x2', 'H2L2-(6+1)x1'),
    ]
    for schedule in schedules:
        assert lite_change(model, schedule)['type'] == 'LiteDINO'
    for layers, main in ((2, 'H3L1-(2+1)x1'), (9, 'H3L1-(3+1)x3')):
        model.encoder.num_layers = layers
        assert main_schedule(model) == main
    model.encoder.num_layers = 1
    with pytest.raises(ValueError, match='has a single layer'):
        main_schedule(model)
    model.encoder.layer_cfg.self_attn_cfg.num_levels = 1
    with pytest.raises(ValueError, match='sees a single map'):
        fitting_schedules(model)


@pytest.mark.parametrize(
    ('name', 'schedule', 'message'),
    [
        ('detr/detr_r50_8xb2-150e_coco.py', SCHEDULE, 'DETR has no deformable encoder'),
        (DINO, 'H2L1-(2+1)x3', r'3 feature levels, .*=4; use H3L1-\(2\+1\)x3, H2L2-\(2\+1\)x3$'),
        (DINO, 'H3L1-(2+1)x2', r'4 layers, .* is 6; use one of H3L1-\(1\+1\)x6, H3L1-\(2\+1\)x3,'),
        (DINO, 'H3L1', 'is not of the form'),
        (MASK2FORMER, SCHEDULE, 'use H2L1'),
    ],
)
def test_why_there_is_none(name, schedule, message):
    with pytest.raises(ValueError, match=message):
        lite_change(get_config(f'mmdet::{name}').model, schedule)


@pytest.mark.parametrize('style', ['classes', 'full names'])
def test_python_style(tmp_path, style):
    """A stock DINO in Python style, as somebody writes it and as MMEngine dumps it."""
    path = tmp_path / 'configs/stock.py'
    path.parent.mkdir()
    path.write_text(Path(python_style_dino.__file__).read_text())
    if style == 'full names':
        Config.fromfile(path).dump(path)
    stock = load_config(str(path))
    assert main_schedule(stock.model) == 'H3L1-(2+1)x1'
    path = tmp_path / 'lite.py'
    changes = {'model.num_queries': 30, 'train_cfg': dict(max_epochs=2)}
    path.write_text(lite_config(stock, 'configs/stock.py', 'H3L1-(2+1)x1', changes))
    lite = load_config(str(path))
    assert (lite.model.num_queries, lite.train_cfg.max_epochs) == (30, 2)
    model = build_detector(lite)
    assert type(model).__name__ == 'LiteDINO' and len(model.encoder.layers) == 2
    expected = copy.deepcopy(stock.model)
    expected.update(type='DINO', num_queries=30)
    assert stock_config(lite.model).to_dict() == expected.to_dict()
    mmlite.to_lite(built := build_detector(stock), 'H3L1-(2+1)x1')
    assert families.is_lite(built.cfg.model.type)


def test_imports_and_what_cannot_be_inherited():
    stock = Config.fromfile(python_style_dino.__file__)
    stock.custom_imports = dict(imports=['mine'])  # which are kept
    assert "imports=['mine', 'mmlite']" in lite_config(stock, 'stock.py', 'H3L1-(2+1)x1')
    for base, start in (('../../a/stock.py', '...a.stock'), ('stock.py', '.stock')):
        assert f'from {start} import *' in lite_config(stock, base, 'H3L1-(2+1)x1')
    with pytest.raises(ValueError, match='give the whole list'):
        lite_config(stock, 'stock.py', 'H3L1-(2+1)x1', {'model.neck.in_channels.0': 8})
    with pytest.raises(ValueError, match='rename its file and folders'):
        lite_config(stock, '../dino-4scale/stock.py', 'H3L1-(2+1)x1')
