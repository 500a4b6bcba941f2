from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys

import pytest

from mmlite.openmmlab import startup


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported and is not."""
    name = 'a_module_to_wait_for'
    (tmp_path / f'{name}.py').write_text('value = 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)
    startup._WAITING.actions.pop(name, None)


def test_acts_after_the_first_import(module):
    seen = []
    startup.when_imported(module, lambda module: seen.append(module.value))
    startup.when_imported(module, lambda module: seen.append(module))
    assert module not in sys.modules
    assert seen == []
    imported = importlib.import_module(module)
    assert seen == [1, imported]
    importlib.import_module(module)
    assert len(seen) == 2


def test_acts_at_once_on_what_is_imported(module):
    imported = importlib.import_module(module)
    seen = []
    startup.when_imported(module, seen.append)
    assert seen == [imported]


def test_a_module_that_is_not_there_stays_missing():
    startup.when_imported('no_such_module', pytest.fail)
    with pytest.raises(ModuleNotFoundError, match='no_such_module'):
        importlib.import_module('no_such_module')
    assert importlib.util.find_spec('no_such_module') is None
    startup._WAITING.actions.pop('no_such_module')


def test_looking_for_a_module_is_not_importing_it(module):
    seen = []
    startup.when_imported(module, seen.append)
    assert importlib.util.find_spec(module) is not None
    assert seen == []
    importlib.import_module(module)
    assert len(seen) == 1


AT_STARTUP = """
import sys
sys.path.insert(0, {folder!r})
import _mmlite_imports
_mmlite_imports.at_startup()
from mmengine.config import Config
print(*(Config.fromfile(f'{{name}}.py', import_custom_modules=False).model.type
        for name in ('mine', 'stock')))
print('mmlite' in sys.modules)
"""


def test_names_configs_without_importing_mmlite(tmp_path):
    """As tools read a config: before anything in it is imported."""
    shutil.copy(startup.__file__, tmp_path / '_mmlite_imports.py')
    lite = 'mmlite::lite_dino/lite-dino-4scale_r50_h3l1-2p1x3_8xb2-12e_coco.py'
    (tmp_path / 'mine.py').write_text(f'_base_ = {lite!r}')
    (tmp_path / 'stock.py').write_text("_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'")
    # -S: without what the installed package has put in place.
    path = os.pathsep.join(path for path in sys.path if path)
    printed = subprocess.check_output(
        [sys.executable, '-S', '-c', AT_STARTUP.format(folder=str(tmp_path))],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': path},
        text=True,
    )
    assert printed.splitlines()[-2:] == ['LiteDINO DINO', 'False']
