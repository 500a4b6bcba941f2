"""Compile the Triton kernels for a GPU that need not be there, and read what they take of it.

The operators are called as ever, on CPU tensors, up to the point where a kernel would be launched;
no kernel can be launched in such a process. It prints the tables of docs/kernels-gpu.md.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mmlite.ops.triton import launch

_DISASSEMBLER = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
VARIANTS = ('shared key', 'key apart', 'standard')


class Resources(NamedTuple):
    """What one compiled kernel takes, from its machine code.

    Attributes:
        registers (int): Registers of a thread.
        local_bytes (int): Local memory of a thread, for spilled registers.
        shared_bytes (int): Shared memory of a program.
        instructions (int): Machine instructions of the whole kernel.
        wide_loads (int): Global loads of 128 bits a thread.
        narrow_loads (int): Global loads of fewer bits.
        wide_atomics (int): Atomic additions of four numbers a thread.
        narrow_atomics (int): Atomic additions of one number.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    instructions: int
    wide_loads: int
    narrow_loads: int
    wide_atomics: int
    narrow_atomics: int


def arguments_of(
    variant: str,
    dtype: torch.dtype = torch.float32,
    dim: int = 32,
    levels: int = 4,
    points: int = 4,
    boxes: bool | None = None,
) -> list:
    """The registered operator's arguments, of any sizes: they are not compiled in.

    With ``boxes`` false or true they are offsets from points or from boxes, which also share one
    set of offsets.
    """
    batch, queries, heads, side = 2, 11, 3, 4
    value = torch.zeros(batch, levels * side * side, heads, dim, dtype=dtype)
    query = None if variant == 'standard' else value.new_zeros(batch, queries, heads, dim)
    key = torch.zeros_like(value) if variant == 'key apart' else None
    sampling = torch.zeros(batch, queries, heads, 1 if boxes else levels, points, 2)
    reference, weights = None, None
    if boxes is not None:
        sampling = sampling.to(dtype)
        reference = value.new_zeros(batch, queries, levels, 4 if boxes else 2)
    if variant == 'standard':
        weights = value.new_zeros(batch, queries, heads, levels, points)
    return [query, key, value, [side] * 2 * levels, reference, sampling, weights]


def compile_kernels(arguments: list, arch: int) -> dict[str, Resources]:
    """Compile what an operator's forward and backward launch.

    Args:
        arguments (list): The operator's, on the CPU.
        arch (int): Compute capability, 90 for 9.0.

    Returns:
        dict[str, Resources]: By the kernel's name: ``forward``, ``backward`` and, under
        deterministic algorithms, ``ordered_sum``.
    """
    compiled = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled[self.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs)

    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget('cuda', arch, 32),
        get_current_device=lambda: arch,  # kernels compiled before are looked up by it
        get_current_stream=lambda device: 0,
    )
    driver.set_active(device)
    capability = divmod(arch, 10)
    with (
        mock.patch.object(JITFunction, 'run', compile_only),
        mock.patch.object(launch, '_capability_of', lambda tensor: capability),
    ):
        output = launch.forward(*arguments)
        launch.backward(output, *arguments, [True] * 6)
    return {name: resources(kernel) for name, kernel in compiled.items()}


def resources(compiled: CompiledKernel) -> Resources:
    """Read a compiled kernel's machine code with the tools in Triton's package."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as cubin:
        cubin.write(compiled.asm['cubin'])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [_DISASSEMBLER, flag, cubin.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ('-res-usage', '-sass')
        )
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
    names = re.findall(r'^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)', code, re.M)
    count = Counter()
    for name in names:
        if name.startswith('LDG'):
            count['wide_loads' if '.128' in name else 'narrow_loads'] += 1
        elif name.startswith(('RED.', 'REDG.', 'ATOMG.')):
            count['wide_atomics' if 'F32x4' in name else 'narrow_atomics'] += 1
    return Resources(
        registers=int(registers),
        local_bytes=int(stack),
        shared_bytes=compiled.metadata.shared,
        instructions=sum(name != 'NOP' for name in names),
        **{field: count[field] for field in Resources._fields[4:]},
    )


def config_of(kernel: str, variant: str, arch: int, points: int, dim: int) -> tuple[int, int]:
    """What :func:`compile_kernels` compiles a kernel for."""
    padded = triton.next_power_of_2(points), triton.next_power_of_2(dim)
    wide = kernel == 'backward' and arch < 90 and variant != 'key apart'
    return launch.configuration(*padded, wide)


def check() -> None:
    """Compile everything once; complain about spills and narrow feature loads."""
    for arch, (variant, dtype) in itertools.product(
        (80, 90),
        (
            ('shared key', torch.float32),
            ('shared key', torch.float16),
            ('key apart', torch.float32),
            ('standard', torch.float32),
        ),
    ):
        tiles = 4 * (2 if variant == 'key apart' else 1)  # one a pixel
        for name, kernel in compile_kernels(arguments_of(variant, dtype), arch).items():
            context = (arch, variant, dtype, name, kernel)
            block_q, num_warps = config_of(name, variant, arch, 4, 32)
            elements = 4 * 32 * block_q // (32 * num_warps)  # of a tile, a thread
            assert kernel.wide_loads >= tiles * elements * dtype.itemsize // 16, context
            assert kernel.local_bytes <= (0 if name == 'forward' else 256), context
        if dtype == torch.float16 or variant == 'standard':
            for boxes in (False, True):
                offsets = arguments_of(variant, dtype, boxes=boxes)
                for name, kernel in compile_kernels(offsets, arch).items():
                    spills = 0 if name == 'forward' else 256
                    assert kernel.local_bytes <= spills, (arch, variant, dtype, boxes, name, kernel)
    for dim in (24, 64):
        compile_kernels(arguments_of('shared key', torch.bfloat16, dim), 90)
    with mock.patch.object(launch, '_INT32_ELEMENTS', 1):
        compile_kernels(arguments_of('shared key', torch.float16), 90)
        torch.use_deterministic_algorithms(True)
        assert 'ordered_sum' in compile_kernels(arguments_of('key apart', torch.float16), 90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 90], help='e.g. 80 90')
    parser.add_argument('--dtype', nargs='+', default=['float32', 'float16'])
    parser.add_argument('--variant', default='shared key', choices=VARIANTS)
    parser.add_argument('--dim', type=int, default=32, help='head size')
    parser.add_argument('--levels', type=int, default=4)
    parser.add_argument('--points', type=int, default=4)
    parser.add_argument('--check', action='store_true', help='only check, as the tests do')
    args = parser.parse_args()
    if args.check:
        check()
        return
    print(f'{args.variant}, head size {args.dim}, {args.levels} levels, {args.points} points\n')
    print('| sm | dtype | kernel | queries | warps | ' + ' | '.join(Resources._fields) + ' |')
    print('|---' * (5 + len(Resources._fields)) + '|')
    for arch, dtype in itertools.product(args.arch, args.dtype):
        arguments = arguments_of(
            args.variant, getattr(torch, dtype), args.dim, args.levels, args.points
        )
        for name, kernel in compile_kernels(arguments, arch).items():
            config = config_of(name, args.variant, arch, args.points, args.dim)
            print('| ' + ' | '.join(map(str, (arch, dtype, name, *config, *kernel))) + ' |')


if __name__ == '__main__':
    main()
