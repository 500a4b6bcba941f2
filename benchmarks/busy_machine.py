"""How OpenMP's waiting threads fare alone and beside other busy processes.

    python benchmarks/busy_machine.py                          # every setting below, a few minutes
    python benchmarks/busy_machine.py 'GOMP_SPINCOUNT=1000'    # one, beside the default

A team of threads ends each parallel region by waiting for its last member, and a thread that is
done waits by spinning, in the belief that the others run. Where other processes hold the cores
they do not, and the time that the spinning takes is taken from them. Each setting gets a process of
its own that trains the demo's detector; in turns, and in one run, each is timed with the machine to
itself and then beside busy processes.
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
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

SETTINGS = (
    '',
    'OMP_WAIT_POLICY=PASSIVE',
    'GOMP_SPINCOUNT=100',
    'GOMP_SPINCOUNT=1000',
    'GOMP_SPINCOUNT=10000',
    'OMP_NUM_THREADS=1',
)
BUSY = (sys.executable, '-c', 'while True: pass')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('settings', nargs='*', metavar='NAME=VALUE[,NAME=VALUE]')
    parser.add_argument('--company', type=int, default=2, help='busy processes (default: 2)')
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=3.0, help='of one measurement')
    parser.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return serve(arguments.seconds)

    settings = ['', *filter(None, arguments.settings)] if arguments.settings else SETTINGS
    with ExitStack() as stack:
        workers = {text: stack.enter_context(worker(text, arguments.seconds)) for text in settings}
        for measure in workers.values():
            measure(None)  # until each has set itself up and warmed up
        alone = collect(workers, arguments.rounds)
        for _ in range(arguments.company):
            stack.callback(subprocess.Popen(BUSY).kill)
        company = collect(workers, arguments.rounds)
    print(
        f'Milliseconds alone and beside {arguments.company} busy processes, {os.cpu_count()} cores'
    )
    print('| setting | operator: alone | in company | training step: alone | in company |')
    print('|---|---|---|---|---|')
    for text in settings:
        cells = [f'{times[text][k]:.3g}' for k in ('call', 'step') for times in (alone, company)]
        print(f'| {f"`{text}`" if text else "none"} | {" | ".join(cells)} |')


def collect(workers: dict[str, Callable[[], dict]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds in alternating order, in which a drift falls on all settings alike."""
    results = {text: [] for text in workers}
    for number in range(rounds):
        for text in list(workers)[:: -1 if number % 2 else 1]:
            results[text].append(workers[text]())
    return {
        text: {key: statistics.median(r[key] for r in rounds_) for key in rounds_[0]}
        for text, rounds_ in results.items()
    }


@contextmanager
def worker(setting: str, seconds: float):
    """A process with the setting in its environment; call what this gives for a measurement."""
    variables = dict(pair.split('=') for pair in setting.split(',') if pair)
    unset = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'OMP_NUM_THREADS')
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.Popen(
        [sys.executable, __file__, '--measure', '--seconds', str(seconds)],
        env={**environment, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def measure(order: str | None = 'go') -> dict[str, float]:
        if order:
            print(order, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    try:
        yield measure
    finally:
        process.kill()


def serve(seconds: float) -> None:
    """Answer each line of stdin with a measurement."""
    import torch

    from mmlite.cli.demo import TASKS, _build, _quiet
    from mmlite.datasets import generate_shapes
    from mmlite.ops import ms_deform_attn

    sizes = ((16, 16), (8, 8), (4, 4), (2, 2))
    tokens = sum(height * width for height, width in sizes)
    value = torch.rand(1, tokens, 8, 32)
    locations, weights = torch.rand(1, tokens, 8, 4, 4, 2), torch.rand(1, tokens, 8, 4, 4)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        generate_shapes(Path(folder) / 'data', {'train': 8, 'val': 8})
        runner = _build(f'small/{TASKS["detection"][1]}.py', Path(folder), 1, 0)
        optim_wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
        (batch,) = runner.build_dataloader(runner.cfg.train_dataloader)
    runner.model.init_weights()
    runner.model.train()

    def step() -> None:
        runner.model.train_step(batch, optim_wrapper)

    def call() -> None:
        with torch.no_grad():
            ms_deform_attn(value, sizes, locations, weights)

    step()
    call()
    print('{}', flush=True)
    for _ in sys.stdin:
        times = {'call': median_time(call, seconds), 'step': median_time(step, seconds)}
        print(json.dumps(times), flush=True)


def median_time(call: Callable[[], None], seconds: float) -> float:
    """Milliseconds of one call: the median over at least two calls and ``seconds``."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


if __name__ == '__main__':
    main()
