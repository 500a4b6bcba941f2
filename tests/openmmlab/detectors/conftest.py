"""Small detectors made from MMDetection's own configs, and batches to run them on."""

from __future__ import annotations

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from small_detectors import SMALL

register_all_modules()


SWIN = dict(
    backbone=dict(depths=[1, 1, 1, 1], with_cp=False, init_cfg=None),
    neck=dict(in_channels=[192, 384, 768]),
)


@pytest.fixture
def user_config(tmp_path):
    """Write and read a config file as a user would who inherits ``base``."""

    def read(base: str, **overrides) -> Config:
        path = tmp_path / 'user_config.py'
        lines = [f'_base_ = {base!r}', "custom_imports = dict(imports=['mmlite'])"]
        lines += [f'{name} = {value!r}' for name, value in overrides.items()]
        path.write_text('\n'.join(lines) + '\n')
        return Config.fromfile(path)

    return read


@pytest.fixture
def small_model(user_config):
    """Build a stock config's detector in small, with changes to ``model``."""

    def build(base: str, **model) -> torch.nn.Module:
        config = user_config(f'mmdet::{base}', model=model)
        is_swin = config.model.backbone.type == 'SwinTransformer'
        config.merge_from_dict(dict(model={**SMALL, **(SWIN if is_swin else {})}))
        config.merge_from_dict(dict(model=model))
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        torch.nn.init.normal_(model.level_embed)  # MMDetection leaves it as the memory was
        return model

    return build


@pytest.fixture
def batch():
    """Make a preprocessed training batch; ``padded`` gives the images different sizes."""

    def make(model: torch.nn.Module, padded: bool = True) -> dict:
        sizes = [(3, 96, 128), (3, 128, 80)] if padded else [(3, 96, 128)] * 2
        packed = demo_mm_inputs(2, sizes, num_items=[3, 2], num_classes=5)
        return model.data_preprocessor(packed, training=True)

    return make


@pytest.fixture
def randomise():
    """Give the transformer's zero-initialised parameters an influence on the output."""

    def fill(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(3)
        for module in (model.encoder, model.decoder, model.bbox_head):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
        return model

    return fill
