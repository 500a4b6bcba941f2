"""``mmlite benchmark``: operators, encoders and whole detectors against each other."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

DTYPES = ('float32', 'bfloat16', 'float16')


class ImageSize(click.ParamType):
    """Height and width, written 800x1333."""

    name = 'HxW'

    def convert(self, value, param, ctx) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r'(\d+)x(\d+)', value)
        if match is None or '0' in match.groups():
            self.fail(f'{value!r} is not a size; write height x width, for example 800x1333')
        return int(match[1]), int(match[2])


def shared_options(rounds: int) -> Callable:
    """The options that every benchmark has."""
    file = click.Path(dir_okay=False, path_type=Path)
    options = [
        click.option('--image-size', type=ImageSize(), default='800x1333', show_default=True),
        click.option('--batch-size', type=click.IntRange(1), default=1, show_default=True),
        click.option('--device', default='cpu', show_default=True, help='cpu, cuda or cuda:1.'),
        click.option('--threads', type=click.IntRange(1), help='CPU threads. Default: all cores.'),
        click.option(
            '--rounds',
            type=click.IntRange(1),
            default=rounds,
            show_default=True,
            help='Measurements of each contestant.',
        ),
        click.option('--warmup', type=click.IntRange(1), default=2, show_default=True),
        click.option('--json', 'json_path', type=file),
        click.option(
            '--markdown', 'markdown_path', type=click.Path(dir_okay=False, path_type=Path)
        ),
    ]

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(context_settings={'help_option_names': ['-h', '--help']})
def benchmark() -> None:
    """Measure operators, encoders or detectors against each other, paired, in one run.

    \b
    Example:
      mmlite benchmark ops
      mmlite benchmark encoder
      mmlite benchmark compare mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py VARIANT.py
    """
    warnings.filterwarnings('ignore')  # those of the stack about itself bury the table


@benchmark.command()
@shared_options(rounds=10)
@click.option('--queries', type=click.IntRange(1), help='Number of queries. Default: all tokens.')
@click.option('--heads', type=click.IntRange(1), default=8, show_default=True)
@click.option('--head-dim', type=click.IntRange(1), default=32, show_default=True)
@click.option('--points', type=click.IntRange(1), default=4, show_default=True)
@click.option('--dtype', type=click.Choice(DTYPES), default='float32', show_default=True)
@click.option(
    '--locations',
    type=click.Choice(['grid', 'uniform']),
    default='grid',
    show_default=True,
    help='Sampling locations around each query as in a model, or anywhere.',
)
@click.option('--forward-only', is_flag=True, help='Leave out the backward pass.')
@click.option('--scaling', is_flag=True, help='Also vary image size, queries and threads.')
def ops(
    image_size,
    batch_size,
    device,
    threads,
    rounds,
    warmup,
    json_path,
    markdown_path,
    queries,
    heads,
    head_dim,
    points,
    dtype,
    locations,
    forward_only,
    scaling,
) -> None:
    """Measure every backend of the operators against plain PyTorch and mmcv's operator.

    Ratios are medians over pairs of rounds, with their quartiles. Memory is the peak beyond the
    inputs. Bandwidth counts every input once and the output once.

    \b
    Example:
      mmlite benchmark ops
      mmlite benchmark ops --threads 1 --scaling --json ops.json
      mmlite benchmark ops --device cuda --dtype float16 --batch-size 8
    """
    import torch

    from ..analysis import operators
    from ..analysis.latency import describe_machine, num_threads

    check_device(device)
    shape = operators.Shape(
        image_size,
        batch_size,
        queries,
        heads,
        head_dim,
        points,
        locations,
        getattr(torch, dtype),
        device,
    )
    with num_threads(threads), progress() as start:
        machine = describe_machine(device)
        results, left_out = operators.benchmark_operators(
            shape,
            passes=operators.PASSES[: 1 if forward_only else 2],
            rounds=rounds,
            warmup=warmup,
            start=lambda total: start('operators', total),
        )
        copy = operators.copy_bandwidth(device)
        curves = _scaling(shape, rounds, start) if scaling else []

    tables = operators.tables(shape, results, copy)
    tables += [operators.scaling_table(curve) for curve in curves]
    report = {
        'machine': machine,
        'settings': {**shape.__dict__, 'dtype': dtype, 'rounds': rounds},
        'copy_bandwidth': copy,
        'results': [result.as_json() for result in results],
        'scaling': [point for curve in curves for point in curve],
        'left_out': left_out,
    }
    notes = [f'Not measured: {name}: {reason}.' for name, reason in left_out.items()]
    deliver(report, tables, notes, json_path, markdown_path)


def _scaling(shape, rounds: int, start) -> list[list[dict]]:
    from ..analysis import operators
    from ..analysis.inputs import level_sizes

    height, width = shape.image_size
    sizes = [(height * s // 4, width * s // 4) for s in (2, 3, 4, 5)]
    tokens = sum(h * w for h, w in level_sizes(shape.image_size))
    axes = {
        'image_size': sizes,
        'num_queries': [*(n for n in (300, 900, 3000, 10000) if n < tokens), tokens],
    }
    if shape.device == 'cpu':
        import torch

        most = torch.get_num_threads()
        axes['threads'] = sorted({1, *(n for n in (2, 4, 8, 16, 32) if n < most), most})
    step = start('scaling', sum(map(len, axes.values())))
    return [
        operators.benchmark_scaling(shape, axis, values, rounds=rounds, on_step=step)
        for axis, values in axes.items()
    ]


@benchmark.command()
@shared_options(rounds=10)
@click.option(
    '--schedule',
    'schedules',
    multiple=True,
    default=['H3L1-(2+1)x3'],
    show_default=True,
    help='A Lite schedule of six layers over four levels; give it more than once for more.',
)
@click.option(
    '--ffn',
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help='Hidden size: 2048 in DINO, 1024 in Deformable DETR.',
)
@click.option(
    '--dtype',
    type=click.Choice(DTYPES),
    default='float32',
    show_default=True,
    help='Other than float32: autocast.',
)
@click.option('--train', is_flag=True, help='Also measure a training step.')
@click.option('--profile', is_flag=True, help='Also show where the time of inference goes.')
def encoder(
    image_size,
    batch_size,
    device,
    threads,
    rounds,
    warmup,
    json_path,
    markdown_path,
    schedules,
    ffn,
    dtype,
    train,
    profile,
) -> None:
    """Measure MMDetection's encoder, the same on our operator, and Lite schedules.

    All have six layers over four levels and random weights. A training step is a forward and a
    backward pass; memory is the peak beyond parameters and inputs.

    \b
    Example:
      mmlite benchmark encoder
      mmlite benchmark encoder --train --profile --json encoder.json
      mmlite benchmark encoder --schedule 'H2L2-(2+1)x3' --schedule 'H3L1-(6+1)x1' --ffn 1024
    """
    from ..analysis import encoders
    from ..analysis.latency import describe_machine, num_threads

    check_device(device)
    setting = encoders.Setting(image_size, batch_size, ffn_channels=ffn, dtype=dtype, device=device)
    with num_threads(threads), progress() as start:
        machine = describe_machine(device)
        results = encoders.benchmark_encoders(
            setting,
            schedules,
            training=train,
            rounds=rounds,
            warmup=warmup,
            start=lambda total: start('encoders', total),
        )
        if profile:
            profiles, peak = encoders.profile_encoders(setting, schedules)
    report = {
        'machine': machine,
        'settings': {**asdict(setting), 'rounds': rounds},
        'results': [result.as_json() for result in results],
    }
    tables = encoders.tables(setting, results)
    if profile:
        tables.append(encoders.profile_table(profiles, peak))
        report['profile'] = {name: asdict(profile) for name, profile in profiles.items()}
        report['matmul_peak'] = peak
    deliver(report, tables, [], json_path, markdown_path)


def check_device(device: str) -> None:
    """Refuse a device that is not there before any work is done."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(f'device {device!r} cannot be used here: {reason}') from error


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """A progress bar on stderr: give a text and a number of steps, get what to call after each."""
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def start(text: str, total: int) -> Callable[[], None]:
            task = bar.add_task(text, total=total)
            return lambda: bar.advance(task)

        yield start


def deliver(report: dict, tables: list, notes: list[str], json_path, markdown_path) -> None:
    """Print for people; write for programs and for documents."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    machine = ', '.join(f'{name}: {text}' for name, text in report['machine'].items())
    console.print(machine, highlight=False)
    for table in tables:
        shown = RichTable(title=table.title, title_justify='left')
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify='right' if index else 'left', no_wrap=not index)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for note in notes:
        console.print(note, highlight=False)
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + '\n')
    if markdown_path:
        parts = [f'{machine}\n', *(table.markdown() for table in tables), *notes]
        markdown_path.write_text('\n'.join(parts) + '\n')
