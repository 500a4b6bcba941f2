from commands import mmlite, refused
from mmengine.config import Config

DINO = 'mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py'


def test_writes_a_config_that_inherits_a_file(tmp_path):
    stock, lite = tmp_path / 'stock.py', tmp_path / 'further/lite.py'
    lite.parent.mkdir()
    stock.write_text(f'_base_ = {DINO!r}\nmodel = dict(num_queries=300)\n')
    mmlite('lite-config', stock, '--schedule', 'h3l1-(3+1)x2', '-o', lite)
    assert lite.read_text().startswith("_base_ = '../stock.py'\n")
    model = Config.fromfile(lite).model
    assert (model.type, model.num_queries) == ('LiteDINO', 300)
    assert model.encoder.schedule == 'H3L1-(3+1)x2'
    refused('is the stock config itself', 'lite-config', stock, '-o', stock)

    changes = ('--cfg-options', 'model.num_queries=300', 'train_cfg.max_epochs=2')
    output = mmlite('lite-config', DINO, '-o', tmp_path / 'main', *changes)
    assert 'schedule H3L1-(2+1)x3, the main one that fits' in output
    config = Config.fromfile(tmp_path / 'main.py')
    assert (config.model.num_queries, config.train_cfg.max_epochs) == (300, 2)
    assert config.model.encoder.schedule == 'H3L1-(2+1)x3'


def test_shows_schedules_with_their_cost():
    output = mmlite('lite-config', DINO, '--image-size', 128, 160)
    rows = [row for row in output.splitlines() if 'stock' in row or 'H3L1-(2+1)x3' in row]
    assert '%' not in rows[0] and '59%' in rows[1]


def test_wrong_use_is_one_sentence(tmp_path):
    for arguments, message in (
        (('mmdet::yolox/yolox_s_8xb8-300e_coco.py',), 'YOLOX has no deformable encoder'),
        ((DINO, '--schedule', 'H2L1-(2+1)x3'), 'is for 3 feature levels'),
        ((DINO, '-o', tmp_path / 'lite.py', '--cfg-options', 'a.0.b=1'), 'give the whole list'),
        ((tmp_path / 'none.py',), 'does not exist'),
    ):
        assert refused(message, 'lite-config', *arguments).count('\n') == 1
