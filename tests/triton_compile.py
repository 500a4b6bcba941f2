"""Compile the Triton kernels for a GPU that need not be there, and read what they take of it.

``python tests/triton_compile.py --help`` prints the tables of docs/kernels-gpu.md.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmlite.ops.triton import kernels
from mmlite.ops.triton.tuning import Config, candidates

_DISASSEMBLER = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
_POINTERS = {'fp32': '*fp32', 'fp16': '*fp16', 'bf16': '*bf16'}


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


def compile_kernel(
    name: str,
    variant: str,
    arch: int,
    dtype: str,
    config: Config,
    dim: int = 32,
    levels: int = 4,
    points: int = 4,
    ordered: bool = False,
    index: tl.dtype = tl.int32,
):
    """Compile ``forward``, ``backward`` or ``ordered_sum`` as the operators launch it.

    Locations and weights are float32.
    """
    key_aware, key_apart = variant != 'standard', variant == 'key apart'
    feature = _POINTERS[dtype]
    summed = feature if name == 'ordered_sum' else '*fp32'
    types = {
        **dict.fromkeys(('grad_output', 'value', 'output'), feature),
        **dict.fromkeys(('query', 'grad_query'), feature if key_aware else None),
        'key': feature if key_apart else None,
        'grad_key': summed if key_apart else None,
        'grad_value': summed,
        **dict.fromkeys(('sampling_locations', 'grad_locations'), '*fp32'),
        **dict.fromkeys(('attention_weights', 'grad_weights'), None if key_aware else '*fp32'),
        **dict.fromkeys(('spatial_shapes', 'order', 'row_starts'), '*i64'),
        'pixel_rows': '*i32' if ordered else None,
        **dict.fromkeys(('value_coefficients', 'pixel_weights'), '*fp32' if ordered else None),
        'query_coefficients': '*fp32' if ordered and key_aware else None,
        'scale': 'fp32',
        **dict.fromkeys(('num_queries', 'num_tokens', 'num_heads', 'num_rows'), 'i32'),
    }
    constants = {
        **{argument: None for argument, kind in types.items() if kind is None},
        'KEY_AWARE': key_aware,
        'KEY_IS_VALUE': not key_apart,
        'ORDERED': ordered,
        'L': levels,
        'P': points,
        'LP': levels * points,
        'D': dim,
        'POINTS': triton.next_power_of_2(points),
        'DIM': triton.next_power_of_2(dim),
        'BLOCK_Q': config.block_q,
        'BLOCK_ROWS': 16,
        'INDEX': index,
    }
    kernel = getattr(kernels, name)
    signature = {n: 'constexpr' if n in constants else types[n] for n in kernel.arg_names}
    aligned = {
        (i,): [['tt.divisibility', 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].startswith('*')
    }
    constants = {n: constants[n] for n in kernel.arg_names if n in constants}
    options = {'num_warps': config.num_warps, 'num_stages': 1, 'enable_fp_fusion': True}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget('cuda', arch, 32), options=options)


def resources(compiled) -> Resources:
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
    names = re.findall(
        r'^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+x?4?[A-Z.]*)', code, re.M
    )
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


def check() -> None:
    """Compile one configuration of everything; complain about spills and narrow feature loads."""
    rule = candidates(4, 32)[0]
    elements = 4 * 32 * rule.block_q // (32 * rule.num_warps)  # of a tile, a thread
    for arch, (variant, dtype, itemsize) in itertools.product(
        (80, 90),
        (
            ('shared key', 'fp32', 4),
            ('shared key', 'fp16', 2),
            ('key apart', 'fp32', 4),
            ('standard', 'fp32', 4),
        ),
    ):
        tiles = 4 * (2 if variant == 'key apart' else 1)  # one a pixel
        for name in ('forward', 'backward'):
            found = resources(compile_kernel(name, variant, arch, dtype, rule))
            context = (name, variant, arch, dtype, found)
            assert found.wide_loads >= tiles * elements * itemsize // 16, context
            assert found.local_bytes <= (0 if name == 'forward' else 256), context
    for dim in (8, 24, 64):
        config = candidates(4, triton.next_power_of_2(dim))[0]
        for name in ('forward', 'backward'):
            compile_kernel(name, 'shared key', 90, 'bf16', config, dim=dim)
    compile_kernel('forward', 'key apart', 90, 'fp32', rule, index=tl.int64)
    compile_kernel('backward', 'key apart', 90, 'fp32', rule, ordered=True, index=tl.int64)
    compile_kernel('ordered_sum', 'key apart', 90, 'fp16', rule, ordered=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 90], help='e.g. 80 90')
    parser.add_argument('--dtype', nargs='+', default=['fp32', 'fp16'], choices=list(_POINTERS))
    parser.add_argument('--variant', default='shared key', help="'key apart' or 'standard'")
    parser.add_argument('--dim', type=int, default=32, help='head size')
    parser.add_argument('--levels', type=int, default=4)
    parser.add_argument('--points', type=int, default=4)
    parser.add_argument('--check', action='store_true', help='only check, as the tests do')
    args = parser.parse_args()
    if args.check:
        check()
        return
    print(f'{args.variant}, head size {args.dim}, {args.levels} levels, {args.points} points')
    print('| kernel | sm | dtype | queries | warps | ' + ' | '.join(Resources._fields) + ' |')
    print('|---' * (5 + len(Resources._fields)) + '|')
    configs = candidates(triton.next_power_of_2(args.points), triton.next_power_of_2(args.dim))
    for name, arch, dtype, config in itertools.product(
        ('forward', 'backward'), args.arch, args.dtype, configs
    ):
        compiled = compile_kernel(
            name, args.variant, arch, dtype, config, args.dim, args.levels, args.points
        )
        row = (name, arch, dtype, *config, *resources(compiled))
        print('| ' + ' | '.join(map(str, row)) + ' |', flush=True)


if __name__ == '__main__':
    main()
