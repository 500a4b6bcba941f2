"""Times two builds of the CPU kernels in turns: the wheel's against one from source, say.

    python benchmarks/compare_builds.py mmlite/ops/libmmlite_cpu.so wheelhouse/*_x86_64.whl

Each is a library, or a wheel with one. Both run on the same machine in the same minutes: a process
for each waits for orders, and in every second round they change places. What runs is the attention
of an encoder over all tokens of an image: 8 heads of 32 channels, 4 levels, 4 points, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

KERNELS = 'mmlite/ops/libmmlite_cpu.so'
CALLS = 3  # of each operator in a round


def operators(image_size: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """What is timed, on points around each query."""
    import torch

    from mmlite import ops
    from mmlite.analysis.inputs import operator_inputs

    x = operator_inputs(image_size)
    inputs = [x.query, x.value, x.sampling_locations, x.attention_weights]

    def key_aware():
        return ops.key_aware_deform_attn(
            x.query, x.value, x.value, x.level_sizes, x.sampling_locations
        )

    def standard():
        return ops.ms_deform_attn(x.value, x.level_sizes, x.sampling_locations, x.attention_weights)

    def forward(operator):
        with torch.no_grad():
            operator()

    def forward_and_backward(operator):
        for tensor in inputs:
            tensor.requires_grad_().grad = None
        operator().sum().backward()

    return {
        f'{operator.__name__}, {run.__name__}'.replace('_', ' '): lambda o=operator, r=run: r(o)
        for operator in (key_aware, standard)
        for run in (forward, forward_and_backward)
    }


def serve(image_size: tuple[int, int]) -> None:
    """Print what runs, and for each line that comes in a round's milliseconds."""
    from mmlite.ops import cpu

    timed = operators(image_size)
    print(json.dumps(cpu.status()), flush=True)
    for _ in sys.stdin:
        round_ = {}
        for name, call in timed.items():
            round_[name] = []
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                round_[name].append(1000 * (time.perf_counter() - start))
        print(json.dumps(round_), flush=True)


def library_of(path: Path, folder: Path) -> Path:
    """The library itself, or that of a wheel, extracted."""
    if path.suffix != '.whl':
        return path.resolve()
    with zipfile.ZipFile(path) as wheel:
        return Path(wheel.extract(KERNELS, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('builds', nargs=2, type=Path, metavar='BUILD', help='a library or a wheel')
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--image-size', type=int, nargs=2, default=(800, 1333), metavar=('H', 'W'))
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(tuple(args.image_size))

    with tempfile.TemporaryDirectory() as temporary:
        processes = []
        for build in args.builds:
            folder = Path(temporary, str(len(processes)))
            environment = {
                **os.environ,
                'MMLITE_CPU_LIBRARY': str(library_of(build, folder)),
                'OMP_NUM_THREADS': str(args.threads),
            }
            process = subprocess.Popen(
                [sys.executable, *sys.argv, '--serve'],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
        for build, process in zip(args.builds, processes):
            available, detail = json.loads(process.stdout.readline())
            print(f'{build.name}: {detail}')
            if not available:
                sys.exit(1)

        times: list[dict[str, list[float]]] = [{}, {}]
        for number in range(args.rounds + 1):
            for which in (0, 1) if number % 2 else (1, 0):
                print(file=processes[which].stdin, flush=True)
                for name, found in json.loads(processes[which].stdout.readline()).items():
                    if number:  # the first is to warm up
                        times[which].setdefault(name, []).extend(found)
        for process in processes:
            process.communicate()
    for name in times[0]:
        first, second = (statistics.median(of[name]) for of in times)
        print(f'{name}: {first:.1f} ms and {second:.1f} ms, {second / first - 1:+.1%}')


if __name__ == '__main__':
    main()
