import re
from pathlib import Path

import pytest
import yaml
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

import mmlite  # noqa: F401  (registers the detectors)
from mmlite.openmmlab.families import encoder_name

register_all_modules()
CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = sorted(CONFIGS.glob('[!_]*/*.py'))  # without _base_, which they inherit


@pytest.mark.parametrize('path', FILES, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_builds_what_its_name_says(path, request):
    if 'convnext' in path.stem:
        request.getfixturevalue('mmpretrain')
    if 'mmseg::' in path.read_text():
        pytest.importorskip('mmseg')
    config = Config.fromfile(path)
    if 'language_model' in config.model:
        config.model.language_model.name = request.getfixturevalue('tiny_bert')
    backbone = config.model.backbone
    assert ('swin-' in path.stem) == (backbone.type == 'SwinTransformer')
    assert ('convnext' in path.stem) == (backbone.type == 'mmpretrain.ConvNeXt')
    if backbone.type == 'SwinTransformer':
        backbone.depths = [1, 1, 1, 1]  # the full one takes seconds to build
    model = MODELS.build(config.model)

    schedule = re.search(r'_h(\d)l(\d)-(\d)p1x(\d)', path.stem)
    encoder = model.get_submodule(encoder_name(model))
    if schedule is None:
        assert not hasattr(encoder, 'schedule')
    else:
        assert str(encoder.schedule) == 'H{}L{}-({}+1)x{}'.format(*schedule.groups())
        high_updates, num_blocks = int(schedule[3]), int(schedule[4])
        own_layers = num_blocks if '-sequential' in path.stem else 0
        assert len(encoder.layers) == high_updates * num_blocks + own_layers
        assert encoder.key_aware == ('-no-kda' not in path.stem)
        assert encoder.small_ffn == ('-no-small-ffn' not in path.stem)
    scales = re.search(r'(\d)scale', path.stem)
    assert scales is None or model.num_feature_levels == int(scales[1])
    epochs = re.search(r'-(\d+)e_', path.stem)
    if epochs is not None and 'max_epochs' in config.train_cfg:  # others count iterations
        assert config.train_cfg.max_epochs == int(epochs[1])


@pytest.mark.parametrize('folder', sorted({path.parent for path in FILES}), ids=lambda p: p.name)
def test_metafile_and_readme_know_every_config(folder):
    files = {path.stem for path in folder.glob('*.py')}
    models = yaml.safe_load((folder / 'metafile.yml').read_text())['Models']
    assert {model['Name'] for model in models} == files
    assert all(Path(model['Config']).stem == model['Name'] for model in models)
    readme = (folder / 'README.md').read_text()
    assert {Path(link).stem for link in re.findall(r'\((\S+\.py)\)', readme)} >= files
    index = yaml.safe_load((CONFIGS.parent / 'model-index.yml').read_text())
    assert f'configs/{folder.name}/metafile.yml' in index['Import']
