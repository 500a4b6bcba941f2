"""Scripts that the documentation names, and nothing else runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mmlite

TOOLS = Path(__file__).parents[1] / 'tools'
LIBRARY = Path(mmlite.__path__[0], 'ops/libmmlite_cpu.so')


def run_benchmark(name: str, *options: str | Path, **environment: str) -> list[str]:
    command = [sys.executable, TOOLS.with_name('benchmarks') / name, *options]
    environment = {**os.environ, **environment}
    return subprocess.check_output(command, input='go\n', text=True, env=environment).splitlines()


def write_wheel(path: Path, suffix: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr(f'mmlite/ops/libmmlite_cpu{suffix}', content)
        wheel.writestr(f'mmlite/export/libmmlite_onnxruntime{suffix}', content)
    return path


def test_a_wheel_has_the_libraries_of_its_system(tmp_path):
    spec = importlib.util.spec_from_file_location('wheels', TOOLS / 'wheels.py')
    wheels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheels)
    # The first bytes of a library for each of wheels.TARGETS.
    elf = [b'\x7fELF\x02\x01'.ljust(18, b'\0') + struct.pack('<H', number) for number in (62, 183)]
    headers = [*elf, *(b'\xcf\xfa\xed\xfe' + word + b'\0\0\x01' for word in (b'\x0c', b'\x07'))]
    headers.append(b'MZ'.ljust(0x3C, b'\0') + struct.pack('<I', 64) + b'PE\0\0\x64\x86')
    for target, good in zip(wheels.TARGETS.values(), headers):
        for suffix in ('.so', '.dylib', '.dll'):
            for header in headers:
                wheel = write_wheel(tmp_path / 'a.whl', suffix, header)
                if suffix == target.suffix and header == good:
                    wheels.check_libraries(target, wheel)
                else:
                    with pytest.raises(RuntimeError, match=r'must (be a|have the libraries)'):
                        wheels.check_libraries(target, wheel)


def test_busy_machine_measures_an_operator_and_a_step():
    # The process that it starts for each setting; all of them take minutes.
    options = ('--measure', '--seconds', '0')
    printed = run_benchmark('busy_machine.py', *options, OMP_NUM_THREADS='1')
    ready, measured = map(json.loads, printed[-2:])
    assert ready == {} and measured['call'] > 0 and measured['step'] > 0


@pytest.mark.skipif(not LIBRARY.exists(), reason='the kernels are not compiled, or not for Linux')
def test_compare_builds_times_both(tmp_path):
    wheel = write_wheel(tmp_path / 'a.whl', '.so', LIBRARY.read_bytes())
    options = ('--image-size', '32', '48', '--rounds', '1', '--threads', '1')
    printed = run_benchmark('compare_builds.py', LIBRARY, wheel, *options)
    names = [line.partition(':')[0] for line in printed]
    assert names[:3] == ['libmmlite_cpu.so', 'a.whl', 'key aware, forward'] and len(names) == 6


@pytest.mark.slow
def test_decompositions_are_the_same_and_timed():
    for needed in ('onnxscript', 'onnxruntime', 'openvino'):
        pytest.importorskip(needed)
    printed = run_benchmark('decompositions.py', '--rounds', '1', '--image-size', '64', '96')
    assert sum(bool(re.search(r'(ONNX Runtime|OpenVINO) +\d+ ms$', line)) for line in printed) == 12
