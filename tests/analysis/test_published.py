"""The published rows against what their own configs build."""

from __future__ import annotations

import pytest

from mmlite.analysis.published import PRESETS, preset
from mmlite.openmmlab.build import load_config


@pytest.mark.parametrize('name', PRESETS)
def test_rows_name_configs_of_their_schedule(name):
    rows = [(row, row is group[0]) for group in preset(name) for row in group]
    assert len(rows) == {'paper-table3': 5, 'paper-table4': 14}[name]
    for row, is_baseline in rows:
        config = load_config(row.config)
        if is_baseline:
            assert 'schedule' not in config.model.encoder
        else:
            assert config.model.encoder.schedule == row.model.split()[-1]
        backbone = {'R50': 'ResNet', 'Swin-T': 'SwinTransformer'}[row.backbone]
        assert config.model.backbone.type == backbone


@pytest.mark.parametrize('name', PRESETS)
def test_baseline_costs_most(name):
    for group in preset(name):
        assert all(row.encoder_gflops < group[0].encoder_gflops for row in group[1:])
        assert all(row.ap < group[0].ap for row in group[1:])
        for row in group:
            assert row.ap_small < row.ap < row.ap50
