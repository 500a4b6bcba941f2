import pytest
import torch
from mmengine.runner import checkpoint

from mmlite.openmmlab.build import build_detector, load_config

SMALL = {
    'model.backbone.depth': 18,
    'model.neck.in_channels': [128, 256, 512],
    'model.encoder.num_layers': 1,
    'model.decoder.num_layers': 1,
}


@pytest.fixture
def config():
    return load_config('mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', SMALL)


@pytest.mark.parametrize('name', ['nowhere.py', 'mmlite::nowhere.py', 'mmdet::dino/nowhere.py'])
def test_missing_config(name):
    with pytest.raises(FileNotFoundError, match=r'nowhere\.py'):
        load_config(name)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('model = dict(', 'cannot be read'),
        ("_base_ = 'mmdet::dino/nowhere.py'", 'nowhere'),
        ('optimizer = 1', 'has no model'),
    ],
)
def test_unreadable_config(tmp_path, text, message):
    (tmp_path / 'broken.py').write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_config(str(tmp_path / 'broken.py'))


def test_nothing_is_downloaded(config, monkeypatch):
    monkeypatch.setattr(checkpoint, '_load_checkpoint', lambda *_, **__: pytest.fail('download'))
    model = build_detector(config)
    assert not model.training and len(model.dataset_meta['classes']) == 80
    assert config.model.backbone.init_cfg.type == 'Pretrained'  # the config is left as it was


def test_grounding_dino_without_the_bert_it_names(monkeypatch):
    transformers = pytest.importorskip('transformers')
    stock = 'mmdet::grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py'
    tiny = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    small = transformers.BertConfig
    monkeypatch.setattr(transformers, 'BertConfig', lambda: small(**tiny))
    config = load_config(stock, SMALL)
    model = build_detector(config)
    text = 'person. traffic light. '
    words = model.language_model.tokenizer.tokenize(text)
    assert words == ['person', '.', 'traffic', 'light', '.']
    with torch.no_grad():
        assert model.language_model([text])['embedded'].shape == (1, 7, 32)
    assert config.model.language_model.name == 'bert-base-uncased'


def test_model_that_cannot_be_built(config):
    config.model.encoder.layer_cfg.self_attn_cfg.embed_dims = 255
    with pytest.raises(ValueError, match=r'deformable-detr_r50.* cannot be built: .*255'):
        build_detector(config)


def test_checkpoint(config, tmp_path):
    state = build_detector(config).state_dict()
    state['level_embed'] += 1
    path = tmp_path / 'good.pth'
    torch.save({'state_dict': {**state, 'decoder.aux_reg_branches.0': torch.ones(1)}}, path)
    loaded = build_detector(config, str(path))
    torch.testing.assert_close(loaded.level_embed, state['level_embed'])

    state['extra'] = state.pop('level_embed')
    state['query_embedding.weight'] = torch.zeros(3)
    torch.save({'state_dict': state}, path)
    counts = r'1 are missing \(such as level_embed\).*1 are unknown.* extra\).*1 are of .*query_'
    with pytest.raises(ValueError, match=f'does not fit.*{counts}'):
        build_detector(config, str(path))
    with pytest.raises(FileNotFoundError, match='does not exist'):
        build_detector(config, str(tmp_path / 'nothing.pth'))
    with pytest.raises(ValueError, match=r'1\.pth is a checkpoint: give its config before it'):
        load_config('epoch_1.pth')
    with pytest.raises(ValueError, match='is a checkpoint: a space, not a comma, goes between'):
        load_config('config.py,epoch_1.pth')
