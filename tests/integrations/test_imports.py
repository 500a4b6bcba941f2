from __future__ import annotations

import importlib
import sys

import pytest

from mmlite.integrations import imports


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported and is not."""
    name = 'a_module_to_wait_for'
    (tmp_path / f'{name}.py').write_text('value = 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)
    imports._WAITING.actions.pop(name, None)


def test_acts_after_the_first_import(module):
    seen = []
    imports.when_imported(module, lambda module: seen.append(module.value))
    imports.when_imported(module, lambda module: seen.append(module))
    assert module not in sys.modules
    assert seen == []
    imported = importlib.import_module(module)
    assert seen == [1, imported]
    importlib.import_module(module)
    assert len(seen) == 2


def test_acts_at_once_on_what_is_imported(module):
    imported = importlib.import_module(module)
    seen = []
    imports.when_imported(module, seen.append)
    assert seen == [imported]


def test_a_module_that_is_not_there_stays_missing():
    imports.when_imported('no_such_module', pytest.fail)
    with pytest.raises(ModuleNotFoundError, match='no_such_module'):
        importlib.import_module('no_such_module')
    assert importlib.util.find_spec('no_such_module') is None
    imports._WAITING.actions.pop('no_such_module')


def test_looking_for_a_module_is_not_importing_it(module):
    seen = []
    imports.when_imported(module, seen.append)
    assert importlib.util.find_spec(module) is not None
    assert seen == []
    importlib.import_module(module)
    assert len(seen) == 1
