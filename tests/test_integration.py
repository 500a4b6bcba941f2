from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from mmlite import integration

FITTING = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'}
CONTINUATION = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
}


@pytest.fixture
def installed(monkeypatch):
    """Sets which distributions the check finds."""

    def install(distributions):
        def version(name):
            if name not in distributions:
                raise PackageNotFoundError(name)
            return distributions[name]

        monkeypatch.setattr(integration, 'version', version)

    return install


@pytest.mark.parametrize('distributions', [FITTING, CONTINUATION])
def test_accepts_both_families(installed, distributions):
    installed(distributions)
    integration.require()


@pytest.mark.parametrize(
    ('name', 'found'),
    [('mmengine', '0.8.0'), ('mmcv', '1.7.2'), ('mmcv', '2.2.0'), ('mmdet', '2.28.2')],
)
def test_refuses_a_version_that_does_not_fit(installed, name, found):
    installed({**FITTING, name: found})
    with pytest.raises(ImportError) as raised:
        integration.join()
    text = str(raised.value)
    assert f'{name} is {found}' in text
    assert f"'mmcv{integration._STACK['mmcv']['mmcv']}'" in text
    assert "'onedl-mmdetection>=3.5,<3.6'" in text
    assert '\n' not in text


def test_a_missing_package_is_named_where_it_is_needed(installed):
    installed({name: FITTING[name] for name in ('mmengine', 'mmcv')})
    integration.join()  # the operators work without it
    with pytest.raises(ImportError, match='mmdet is not installed'):
        integration.require()


def run(code: str) -> str:
    """The output of ``code`` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, '-c', code], check=True, capture_output=True, text=True
    ).stdout


def test_operators_need_torch_alone():
    output = run(
        'import sys\n'
        "for name in ('mmcv', 'mmengine', 'mmdet'): sys.modules[name] = None\n"
        'from importlib import metadata\n'
        'found = metadata.version\n'
        'def version(name):\n'
        "    if name.partition('-')[2].startswith('mm') or name.startswith('mm'):\n"
        '        raise metadata.PackageNotFoundError(name)\n'
        '    return found(name)\n'
        'metadata.version = version\n'
        'import mmlite.ops\n'
        'print(len(mmlite.ops.backends()) > 0)\n'
    )
    assert output.split() == ['True']


def test_import_is_light_and_registers():
    output = run(
        'import sys, mmlite\n'
        "print('mmdet.models' in sys.modules)\n"
        'from mmengine.runner import CheckpointLoader\n'
        'from mmdet.registry import MODELS\n'
        "MODELS.get('DINO')\n"
        "print(CheckpointLoader._schemes[''].__module__)\n"
    )
    assert output.split() == ['False', 'mmlite.checkpoints.loading']


def test_registers_after_the_registries_were_filled():
    output = run(
        'from mmdet.registry import MODELS\n'
        "MODELS.get('DINO')\n"
        'import mmlite\n'
        'from mmengine.runner import CheckpointLoader\n'
        "print(CheckpointLoader._schemes[''].__module__)\n"
    )
    assert output.split() == ['mmlite.checkpoints.loading']
