import pytest

from mmlite.analysis.published import PRESETS, preset
from mmlite.openmmlab.build import load_config


@pytest.mark.parametrize('name', PRESETS)
def test_rows_name_configs_of_their_schedule(name):
    groups = preset(name)
    assert sum(map(len, groups)) == {'paper-table3': 5, 'paper-table4': 14}[name]
    for row, first in ((row, group[0]) for group in groups for row in group):
        config = load_config(row.config)
        backbone = {'R50': 'ResNet', 'Swin-T': 'SwinTransformer'}[row.backbone]
        assert config.model.backbone.type == backbone
        assert row.ap_small < row.ap < row.ap50
        if row is first:
            assert 'schedule' not in config.model.encoder
        else:
            assert config.model.encoder.schedule == row.model.split()[-1]
            assert row.encoder_gflops < first.encoder_gflops and row.ap < first.ap
