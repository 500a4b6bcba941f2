"""Tests in clean environments: of every supported set of versions, and of the wheels.

    nox --list
    nox --session 'tests-3.11(onedl, torch 2.4.1)' -- tests/ops

`make matrix` runs the tests of every cell that can be installed, keeps what each installed and how
its tests ended in .nox/matrix, and writes the table of docs/support.md from it. `make test-wheels`
tests the wheel for this machine, from wheelhouse/.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.options.sessions = ['tests', 'support']
nox.options.error_on_missing_interpreters = False

PYTHONS = ['3.10', '3.11', '3.12', '3.13']
PINNED = re.search(r'^torch==(\S+)', Path('requirements/constraints.txt').read_text(), re.M)[1]
TORCHES = ['2.1.2', '2.4.1', PINNED]
# The first torch with wheels for a Python. The earliest were compiled for NumPy 1.
FIRST_TORCH = {'3.12': (2, 2), '3.13': (2, 5)}
FIRST_TORCH_WITH_NUMPY_2 = (2, 3)

OPENMMLAB = ('mmengine>=0.10,<1', 'mmdet>=3.3,<3.4')
ONEDL = ('onedl-mmengine>=0.10,<1', 'onedl-mmdetection>=3.5,<3.6')
# From its sources and in an isolated build, where there is no torch, onedl-mmcv comes without
# compiled operators. Those that have them are taken from wheels only, where pip knows one.
FAMILIES = {
    'openmmlab': (*OPENMMLAB, 'mmcv-lite>=2.0,<2.2'),
    'onedl': (*ONEDL, 'onedl-mmcv>=2.3,<3', '--no-binary=onedl-mmcv'),
    'openmmlab-compiled': (*OPENMMLAB, 'mmcv>=2.0,<2.2', '--only-binary=mmcv'),
    'onedl-compiled': (*ONEDL, 'onedl-mmcv>=2.3,<3', '--only-binary=onedl-mmcv'),
}
RESULTS = Path('.nox/matrix')
REPORTED = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdet')
VERSIONS = f"""
import importlib, json, platform
modules = {{name: importlib.import_module(name).__version__ for name in {REPORTED}}}
print(json.dumps(dict(python=platform.python_version(), **modules)))
"""


def numbers(version: str) -> tuple[int, int]:
    major, minor = version.split('.')[:2]
    return int(major), int(minor)


@nox.session(python=PYTHONS)
@nox.parametrize('torch', TORCHES, ids=[f'torch {version}' for version in TORCHES])
@nox.parametrize('family', list(FAMILIES), ids=list(FAMILIES))
def tests(session: nox.Session, family: str, torch: str) -> None:
    """The tests with one set of versions."""
    if numbers(torch) < FIRST_TORCH.get(str(session.python), (0, 0)):
        session.skip(f'no torch {torch} for Python {session.python}')
    numpy = 'numpy<2' if numbers(torch) < FIRST_TORCH_WITH_NUMPY_2 else 'numpy'
    versions = (f'torch=={torch}', numpy)
    try:
        # First of all, since what is compiled is compiled against it.
        session.install(*versions)
        session.install(*versions, *FAMILIES[family], 'pytest', 'pytest-timeout', 'openmim', '.')
        # openmim asks for an older one, which knows no Python after 3.11.
        session.install('setuptools==79.0.1')
    except CommandFailed:
        session.skip('cannot be installed here')
    found = json.loads(session.run('python', '-c', VERSIONS, silent=True).splitlines()[-1])

    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS.resolve() / f'{session.python}-{torch}-{family}.xml'
    # The entry point, unlike `python -m pytest`, leaves this folder off the path.
    session.run('pytest', f'--junit-xml={report}', *session.posargs, success_codes=[0, 1])
    suite = xml.etree.ElementTree.parse(report).getroot().find('testsuite')
    count = {name: int(suite.get(name)) for name in ('tests', 'failures', 'errors', 'skipped')}
    report.with_suffix('.json').write_text(
        json.dumps({'family': family, **found, **count, 'arguments': session.posargs}, indent=2)
    )
    if count['failures'] + count['errors']:
        session.error(f'{count["failures"] + count["errors"]} tests fail')


@nox.session(venv_backend='none')
def support(session: nox.Session) -> None:
    """Write the table of docs/support.md from what `tests` has found."""
    columns = ('Packages', 'Python', *REPORTED, 'Tests')
    lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
    results = [json.loads(path.read_text()) for path in RESULTS.glob('*.json')]
    for result in sorted(results, key=lambda r: (r['family'], numbers(r['python']), r['torch'])):
        bad = result['failures'] + result['errors']
        passed = result['tests'] - result['skipped'] - bad
        outcome = f'{passed} pass, {result["skipped"]} skipped' + (f', {bad} FAIL' if bad else '')
        part = f' (`{" ".join(result["arguments"])}`)' if result['arguments'] else ''
        versions = (result[name] for name in ('family', 'python', *REPORTED))
        lines.append(f'| {" | ".join(versions)} | {outcome}{part} |')
    page = Path('docs/support.md')
    before, rest = page.read_text().split('<!-- matrix -->\n')
    after = rest.split('<!-- /matrix -->\n')[1]
    table = '\n'.join(lines)
    page.write_text(f'{before}<!-- matrix -->\n{table}\n<!-- /matrix -->\n{after}')
    print(table)


@nox.session(python=['3.9', *PYTHONS])
def wheel(session: nox.Session) -> None:
    """The wheel in wheelhouse/ that fits this machine, installed beside torch alone."""
    session.install('--no-deps', '--no-index', '--find-links=wheelhouse', 'mmlite-detr')
    # Its dependencies. What pip finds installed it leaves alone.
    session.install('--find-links=wheelhouse', 'mmlite-detr', 'pytest', 'pytest-timeout')
    session.run(
        'python',
        '-c',
        'from mmlite import ops; cpu = ops.backends()[0]; print(ops.__file__, cpu); '
        'assert cpu.name == "cpu" and cpu.available and "baseline" not in cpu.detail',
    )
    session.run('pytest', *(session.posargs or ('tests/ops',)))
