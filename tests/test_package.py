import subprocess
import sys
import zipfile
from pathlib import Path

from mmengine.hub import get_config

import mmlite  # noqa: F401  (makes mmlite:: known)

ROOT = Path(__file__).parents[1]
NAME = 'lite_dino/lite-dino-4scale_r50_h3l1-2p1x3_8xb2-12e_coco.py'


def test_wheel_carries_the_configs_and_the_startup(tmp_path):
    # Without the compiled kernels: they take a minute and are no matter here.
    build = ('-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '.')
    options = ('--config-settings=wheel.cmake=false', '--wheel-dir', tmp_path)
    subprocess.check_call([sys.executable, *build, *options], cwd=ROOT)
    (wheel,) = tmp_path.glob('*.whl')
    packed = set(zipfile.ZipFile(wheel).namelist())
    beside = {name for name in packed if '/' not in name}
    assert beside == {'mmlite_startup.pth', '_mmlite_imports.py'}
    configs = [*ROOT.glob('configs/**/*.py'), *ROOT.glob('configs/**/*.yml')]
    assert len(configs) > 20
    for path in (*configs, ROOT / 'model-index.yml'):
        assert f'mmlite/.mim/{path.relative_to(ROOT).as_posix()}' in packed


def test_configs_are_found_by_package_name():
    assert get_config(f'mmlite::{NAME}').model.type == 'LiteDINO'
