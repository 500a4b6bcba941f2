import importlib
import os
import sys
from pathlib import Path

import pytest
from mmdet_tools import run_python

from mmlite.openmmlab import startup


def test_acts_after_the_first_import_and_at_once_from_then_on(tmp_path, monkeypatch):
    module = 'a_module_to_wait_for'
    (tmp_path / f'{module}.py').write_text('value = 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    startup.when_imported(module, lambda module: seen.append(module.value))
    startup.when_imported(module, seen.append)
    assert importlib.util.find_spec(module) is not None  # which is not importing it
    assert module not in sys.modules
    assert seen == []
    imported = importlib.import_module(module)
    assert seen == [1, imported]
    importlib.import_module(module)
    assert len(seen) == 2
    startup.when_imported(module, seen.append)
    assert seen == [1, imported, imported]
    del sys.modules[module], startup._WAITING.actions[module]
    # A module that is not there stays missing.
    startup.when_imported('no_such_module', pytest.fail)
    with pytest.raises(ModuleNotFoundError, match='no_such_module'):
        importlib.import_module('no_such_module')
    assert importlib.util.find_spec('no_such_module') is None
    startup._WAITING.actions.pop('no_such_module')


# What Python does with its own site-packages when it starts.
START = """
import site, sys
site.addsitedir(sys.argv[1])
print({'torch', 'mmlite', 'mmcv'} & set(sys.modules))
for name in ('mmcv._ext', 'mmcv._other'):
    try:
        module = __import__(name, fromlist=['_'])
        print(module.__file__, callable(module.anything))
    except ImportError as error:
        print(error)
print('mmlite' in sys.modules)
from mmengine.config import Config
print(*(Config.fromfile(f'{name}.py', import_custom_modules=False).model.type
        for name in ('mine', 'stock')))
"""


@pytest.mark.parametrize(
    ('code', 'found'),
    [
        ('', 'openmmlab/mmcv_ext.py True'),
        # A module that is there is left alone.
        ('anything = 1', 'mmcv/_ext.py False'),
        ("raise ImportError('built for another torch')", 'built for another torch'),
    ],
)
def test_answers_for_a_missing_module_and_names_configs(tmp_path, code, found):
    """With what an installed package has beside itself, and a bare mmcv."""
    source = Path(__file__).parents[2] / 'mmlite/openmmlab'  # a wheel has no .pth in it
    (tmp_path / 'mmlite_startup.pth').write_text((source / 'startup.pth').read_text())
    (tmp_path / '_mmlite_imports.py').write_text((source / 'startup.py').read_text())
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text('')
    if code:
        (tmp_path / 'mmcv/_ext.py').write_text(code)
    lite = 'mmlite::lite_dino/lite-dino-4scale_r50_h3l1-2p1x3_8xb2-12e_coco.py'
    (tmp_path / 'mine.py').write_text(f'_base_ = {lite!r}')
    (tmp_path / 'stock.py').write_text("_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    # -S: without what the installed package has put in place.
    output = run_python('-S', '-c', START, tmp_path, cwd=tmp_path, PYTHONPATH=path)
    before, extension, other, imported, configs = output.splitlines()
    assert before == 'set()'
    assert extension.endswith(found)
    assert other == "No module named 'mmcv._other'"
    assert imported == 'False'
    assert configs == 'LiteDINO DINO'
