"""Small detectors made from MMDetection's own configs, and batches to run them on."""

from __future__ import annotations

import pytest
from mmdet.utils import register_all_modules
from mmengine.config import Config

register_all_modules()


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
