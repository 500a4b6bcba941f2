"""Scripts that the documentation names, and nothing else runs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mmlite

TOOLS = Path(__file__).parents[1] / 'tools'
BENCHMARKS = TOOLS.with_name('benchmarks')


def load_tool(name: str):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def wheels():
    return load_tool('wheels')


def test_budget_counts_the_lines_of_every_room(tmp_path, capsys):
    (tmp_path / 'CONTRIBUTING.md').write_text('| `mmlite` | 1,000 |\n| `mmlite/ops` | 2 |\n')
    (tmp_path / 'mmlite/ops').mkdir(parents=True)
    (tmp_path / 'mmlite/ops/a.py').write_text('a = 1\n\nb = 2\n')
    assert load_tool('budget').main(tmp_path) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ['mmlite', '3', '/', '1,000']
    assert second.split() == ['mmlite/ops', '3', '/', '2', '1', 'too', 'many']


# The first bytes of a library, by suffix and processor.
HEADERS = {
    '.so': {
        'x86_64': b'\x7fELF\x02\x01'.ljust(18, b'\0') + struct.pack('<H', 62),
        'aarch64': b'\x7fELF\x02\x01'.ljust(18, b'\0') + struct.pack('<H', 183),
    },
    '.dylib': {
        'x86_64': b'\xcf\xfa\xed\xfe\x07\x00\x00\x01',
        'aarch64': b'\xcf\xfa\xed\xfe\x0c\x00\x00\x01',
    },
    '.dll': {
        'x86_64': b'MZ'.ljust(0x3C, b'\0') + struct.pack('<I', 64) + b'PE\0\0\x64\x86',
        'aarch64': b'MZ'.ljust(0x3C, b'\0') + struct.pack('<I', 64) + b'PE\0\0\x64\xaa',
    },
}


def write_wheel(path: Path, suffix: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr('mmlite/ops/cpu.py', '')
        wheel.writestr(f'mmlite/ops/libmmlite_cpu{suffix}', content)
        wheel.writestr(f'mmlite/export/libmmlite_onnxruntime{suffix}', content)
    return path


@pytest.mark.parametrize(
    ('name', 'suffix', 'machine'),
    [
        ('linux-x86_64', '.so', 'x86_64'),
        ('linux-aarch64', '.so', 'aarch64'),
        ('macos-arm64', '.dylib', 'aarch64'),
        ('macos-x86_64', '.dylib', 'x86_64'),
        ('windows-x86_64', '.dll', 'x86_64'),
    ],
)
def test_a_wheel_has_the_libraries_of_its_system(wheels, tmp_path, name, suffix, machine):
    assert len(wheels.TARGETS) == 5
    target = wheels.TARGETS[name]
    good = HEADERS[suffix][machine]
    wheels.check_libraries(target, write_wheel(tmp_path / 'good.whl', suffix, good))

    for other, machines in HEADERS.items():
        for header in machines.values():
            if header == good:
                continue
            # Of another format or processor, under the right name.
            wheel = write_wheel(tmp_path / 'bad.whl', suffix, header)
            with pytest.raises(RuntimeError, match=f'must be a {suffix} for {machine}'):
                wheels.check_libraries(target, wheel)
        if other != suffix:
            wheel = write_wheel(tmp_path / 'bad.whl', other, good)
            with pytest.raises(RuntimeError, match='must have the libraries'):
                wheels.check_libraries(target, wheel)

    with zipfile.ZipFile(tmp_path / 'pure.whl', 'w') as wheel:
        wheel.writestr('mmlite/ops/cpu.py', '')
    with pytest.raises(RuntimeError, match='must have the libraries'):
        wheels.check_libraries(target, tmp_path / 'pure.whl')


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ('Linux', 'x86_64'),
    reason='looks at a library of Linux x86_64',
)
def test_knows_a_library_that_a_compiler_made(wheels):
    library = Path(mmlite.__path__[0], 'ops/libmmlite_cpu.so')
    if not library.exists():
        pytest.skip('the kernels were not compiled')
    assert wheels.kind(library.read_bytes()) == ('.so', 'x86_64')


def test_busy_machine_measures_an_operator_and_a_step():
    # The process that it starts for each setting; all of them take minutes.
    printed = subprocess.check_output(
        [sys.executable, BENCHMARKS / 'busy_machine.py', '--measure', '--seconds', '0'],
        input='go\n',
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    ready, measured = map(json.loads, printed.splitlines()[-2:])
    assert ready == {}
    assert measured.keys() == {'call', 'step'}
    assert all(milliseconds > 0 for milliseconds in measured.values())


def test_compare_builds_times_both(tmp_path):
    library = Path(mmlite.__path__[0], 'ops/libmmlite_cpu.so')
    if not library.exists():
        pytest.skip('the kernels were not compiled, or are not for Linux')
    wheel = write_wheel(tmp_path / 'a.whl', '.so', library.read_bytes())
    options = ('--image-size', '32', '48', '--rounds', '1', '--threads', '1')
    printed = subprocess.check_output(
        [sys.executable, BENCHMARKS / 'compare_builds.py', library, wheel, *options], text=True
    ).splitlines()
    assert printed[0].startswith('libmmlite_cpu.so: ') and ' kernels on 1 threads' in printed[0]
    assert printed[1].startswith('a.whl: ')
    assert [line.partition(':')[0] for line in printed[2:]] == [
        f'{operator}, forward{rest}'
        for operator in ('key aware', 'standard')
        for rest in ('', ' and backward')
    ]


@pytest.mark.slow
def test_decompositions_are_the_same_and_timed():
    for needed in ('onnxscript', 'onnxruntime', 'openvino'):
        pytest.importorskip(needed)
    printed = subprocess.check_output(
        [
            sys.executable,
            BENCHMARKS / 'decompositions.py',
            '--rounds',
            '1',
            '--image-size',
            '64',
            '96',
        ],
        text=True,
    )
    assert len(re.findall(r'(?:ONNX Runtime|OpenVINO) +\d+ ms$', printed, re.MULTILINE)) == 12
