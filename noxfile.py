"""Tests in clean environments: of every supported set of versions, and of the wheels.

    nox --list
    nox --session 'tests-3.11(torch 2.4.1, onedl)' -- tests/ops

`make matrix` builds a wheel and runs a selection of the tests, or those that are named after `--`,
with it in every cell that can be installed. It keeps what each installed and how its tests ended in
.nox/matrix, and writes the table of docs/support.md from it. `make test-wheels` tests the wheel for
this machine, from wheelhouse/: its operators, and the commands that the pages name.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import xml.etree.ElementTree
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.options.sessions = ['tests', 'support']
nox.options.error_on_missing_interpreters = False
# uv links what several environments have in common: twenty times a PyTorch of gigabytes.
nox.options.default_venv_backend = 'uv|virtualenv'
if 'PIP_FIND_LINKS' in os.environ:
    os.environ.setdefault('UV_FIND_LINKS', ','.join(os.environ['PIP_FIND_LINKS'].split()))

PYTHONS = ['3.9', '3.10', '3.11', '3.12', '3.13']
PINNED = re.search(r'^torch==(\S+)', Path('requirements/constraints.txt').read_text(), re.M)[1]
TORCHES = ['2.1.2', '2.4.1', PINNED]
# The first and last torch with wheels for a Python. The earliest were compiled for NumPy 1.
FIRST_TORCH = {'3.12': (2, 2), '3.13': (2, 5)}
LAST_TORCH = {'3.9': (2, 8)}
FIRST_TORCH_WITH_NUMPY_2 = (2, 3)
FIRST_TORCH_OF_ONEDL = (2, 3)

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
# The kernels and their place in autograd and torch.compile.
KERNELS = (
    *('tests/ops/test_cpu.py', 'tests/ops/test_functional.py'),
    # Long, and of the same machine code everywhere.
    '--deselect=tests/ops/test_cpu.py::test_backward_has_the_same_bits_in_blocks',
    '--deselect=tests/ops/test_cpu.py::test_from_offsets_gradcheck',
)
# What a version of Python, PyTorch or MMDetection has broken before: the kernels, the layers, the
# detectors, loading, and training through mim.
SELECTION = (
    *KERNELS,
    *(
        'tests/openmmlab/test_layers.py',
        'tests/openmmlab/detectors/test_lite.py',
        'tests/openmmlab/checkpoints/test_loading.py',
    ),
    *('tests/openmmlab/test_startup.py', 'tests/openmmlab/test_mmcv_ext.py'),
    'tests/test_mim.py',
    '--deselect=tests/openmmlab/detectors/test_lite.py::test_bfloat16_autocast_stays_close',
    # The best instruction set is enough: what differs from cell to cell is around the machine code.
    *('-k', 'not baseline' if platform.machine() in ('x86_64', 'AMD64') else ''),
)
# What runs the commands that README and docs name; tests/test_commands.py has the list.
COMMANDS = (
    *('tests/test_commands.py', 'tests/cli', 'tests/test_mim.py', 'tests/test_cluster.py'),
    *('tests/export/test_export.py', 'tests/analysis/test_complexity.py', 'tests/test_docs.py'),
    'tests/test_tools.py',
)
ROOT = Path(__file__).resolve().parent
DIST = Path('.nox/dist')
RESULTS = Path('.nox/matrix')
REPORTED = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdet')
VERSIONS = f"""
import importlib, json, platform
modules = {{name: importlib.import_module(name).__version__ for name in {REPORTED}}}
print(json.dumps(dict(python=platform.python_version(), **modules)))
"""

IS_INSTALLED = """
import importlib.util, sysconfig
place = importlib.util.find_spec('mmlite').origin
assert place.startswith(sysconfig.get_paths()['platlib']), place
"""
PYTEST = ('pytest', 'pytest-timeout', 'pytest-xdist')


def numbers(version: str) -> tuple[int, int]:
    major, minor = version.split('.')[:2]
    return int(major), int(minor)


def run_tests(session: nox.Session, *arguments: str, **options) -> None:
    """Run pytest with what is installed, on as many cores as there are.

    It starts in an empty folder: a Python that a test starts in this one would find mmlite here.
    """
    paths = [f'{ROOT}/{word}' if word.startswith('tests') else word for word in arguments]
    config = f'-c={ROOT}/pyproject.toml'
    with session.chdir(session.create_tmp()):
        session.run('python', '-c', IS_INSTALLED)
        how = ('-q', '-n=auto', '--max-worker-restart=0', '--timeout=900', '--slow', config)
        session.run('pytest', *how, *paths, **options)


@nox.session
def build(session: nox.Session) -> None:
    """A wheel of what is here, for `tests`."""
    session.install('build')
    for old in DIST.glob('*.whl'):
        old.unlink()
    session.run('python', '-m', 'build', '--wheel', f'--outdir={DIST}', silent=True)


@nox.session(python=PYTHONS, requires=['build'])
@nox.parametrize('family', list(FAMILIES), ids=list(FAMILIES))
@nox.parametrize('torch', TORCHES, ids=[f'torch {version}' for version in TORCHES])
def tests(session: nox.Session, family: str, torch: str) -> None:
    """The tests with one set of versions."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    cell = f'{RESULTS.resolve()}/{session.python}-{torch}-{family}'

    def write(**result) -> None:
        result = {'family': family, 'python': session.python, 'torch': torch, **result}
        Path(f'{cell}.json').write_text(json.dumps(result, indent=2))

    def skip(reason: str) -> None:
        write(reason=reason)
        session.skip(reason)

    first, last = (limit.get(str(session.python)) for limit in (FIRST_TORCH, LAST_TORCH))
    if (first and numbers(torch) < first) or (last and numbers(torch) > last):
        skip('PyTorch has no wheel for this Python')
    if family.startswith('onedl') and numbers(torch) < FIRST_TORCH_OF_ONEDL:
        skip("the continuation's MMEngine needs PyTorch 2.3")
    packages = FAMILIES[family]
    if family.endswith('-compiled'):
        try:
            session.install('--no-deps', *packages[2:], silent=True)
        except CommandFailed:
            skip('no wheel of MMCV with its operators was found')
    versions = [f'torch=={torch}', 'numpy']
    if numbers(torch) < FIRST_TORCH_WITH_NUMPY_2:
        versions[1] += '<2'
    (wheel,) = DIST.glob('*.whl')
    try:
        session.install(*versions, *packages, *PYTEST, 'openmim', str(wheel))
        # openmim asks for an older one, which knows no Python after 3.11.
        session.install('setuptools==79.0.1')
    except CommandFailed:
        skip('the packages do not go together')
    try:
        check = 'import torch, mmcv._ext' if family.endswith('-compiled') else ''
        session.run('python', '-c', check, silent=True)
    except CommandFailed:
        skip('the wheel of MMCV that was found is for another PyTorch')
    found = json.loads(session.run('python', '-c', VERSIONS, silent=True).splitlines()[-1])

    report = Path(f'{cell}.xml')
    arguments = session.posargs or SELECTION
    run_tests(session, f'--junit-xml={report}', *arguments, success_codes=[0, 1])
    suite = xml.etree.ElementTree.parse(report).getroot().find('testsuite')
    count = {name: int(suite.get(name)) for name in ('tests', 'failures', 'errors', 'skipped')}
    write(**found, **count, arguments=session.posargs)
    if count['failures'] + count['errors']:
        session.error(f'{count["failures"] + count["errors"]} tests fail')


@nox.session(venv_backend='none')
def support(session: nox.Session) -> None:
    """Write the table of docs/support.md from what `tests` has found."""
    columns = ('Packages', 'Python', *REPORTED, 'Tests')
    lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
    results = []
    for family, python, torch in itertools.product(FAMILIES, PYTHONS, TORCHES):
        path = RESULTS / f'{python}-{torch}-{family}.json'
        cell = {'family': family, 'python': python, 'torch': torch, 'reason': 'not run yet'}
        results.append(json.loads(path.read_text()) if path.exists() else cell)
    results.sort(key=lambda r: (r['family'], numbers(r['python']), numbers(r['torch'])))
    missing: dict[str, dict[str, list[str]]] = {}  # reason -> Python and PyTorch -> packages
    for result in results:
        if 'reason' in result:
            cells = missing.setdefault(result['reason'], {})
            cell = f'Python {result["python"]} with PyTorch {result["torch"]}'
            cells.setdefault(cell, []).append(result['family'])
            continue
        bad = result['failures'] + result['errors']
        passed = result['tests'] - result['skipped'] - bad
        outcome = f'{passed} pass, {result["skipped"]} skipped' + (f', {bad} FAIL' if bad else '')
        part = f' (`{" ".join(result["arguments"])}`)' if result['arguments'] else ''
        versions = (result[name] for name in ('family', 'python', *REPORTED))
        lines.append(f'| {" | ".join(versions)} | {outcome}{part} |')
    lines += ['', 'Not in the table:'] if missing else []
    for reason, cells in missing.items():
        lines += ['', f'- {reason}:']
        lines += [f'    - {cell}: {", ".join(families)}' for cell, families in cells.items()]
    page = Path('docs/support.md')
    before, rest = page.read_text().split('<!-- matrix -->\n')
    after = rest.split('<!-- /matrix -->\n')[1]
    table = '\n'.join(lines)
    page.write_text(f'{before}<!-- matrix -->\n{table}\n<!-- /matrix -->\n{after}')
    print(table)


def install_wheel(session: nox.Session) -> None:
    """Install the wheel in wheelhouse/ that fits this machine."""
    # uv's cache would give an earlier wheel of the same name.
    wheelhouse = ('--no-deps', '--no-index', '--find-links=wheelhouse')
    session.install(*wheelhouse, 'mmlite-detr', env={'UV_NO_CACHE': '1'})


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """The wheel in wheelhouse/ that fits this machine, installed beside torch alone."""
    install_wheel(session)
    # Its dependencies. What pip finds installed it leaves alone.
    session.install('--find-links=wheelhouse', 'mmlite-detr', *PYTEST)
    session.run(
        'python',
        '-I',
        '-c',
        'from mmlite import ops; cpu = ops.backends()[0]; print(ops.__file__, cpu); '
        'assert cpu.name == "cpu" and cpu.available and "baseline" not in cpu.detail',
    )
    run_tests(session, *(session.posargs or KERNELS))


@nox.session(python='3.11')
def commands(session: nox.Session) -> None:
    """README's first lines with that wheel and without a compiler, and what the pages name."""
    alone = {'PATH': session.bin, 'CC': 'no-compiler', 'CXX': 'no-compiler'}
    install_wheel(session)
    extras = 'mmlite-detr[openmmlab,deploy]'
    session.install('--find-links=wheelhouse', extras, env=alone)
    small = ('--epochs=1', '--train-images=80', '--val-images=20')
    session.run('mmlite', 'demo', *small, f'--out={session.create_tmp()}/demo', env=alone)
    session.install(*PYTEST, 'openmim')
    session.install('setuptools==79.0.1')
    run_tests(session, *(session.posargs or COMMANDS))
