"""``mmlite benchmark``: operators, encoders and whole detectors against each other."""

from __future__ import annotations

import json
import re
import shlex
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


def shared_options(rounds: int, several_batch_sizes: bool = False) -> Callable:
    """The options that every benchmark has."""
    batch_size = {'default': 1}
    if several_batch_sizes:
        batch_size = {'default': [1], 'multiple': True, 'help': 'Give it more than once for more.'}
    file = click.Path(dir_okay=False, path_type=Path)
    options = [
        click.option('--image-size', type=ImageSize(), default='800x1333', show_default=True),
        click.option('--batch-size', type=click.IntRange(1), show_default=True, **batch_size),
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
@click.option('--profile', is_flag=True, help='Also show where the time goes.')
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
            profiles, peak = encoders.profile_encoders(setting, schedules, (rounds + 1) // 2)
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


@benchmark.command()
@click.argument('configs', nargs=-1, metavar='BASELINE VARIANT...')
@click.option(
    '--preset',
    type=click.Choice(['paper-table3', 'paper-table4']),
    help='Instead of configs: every row of a table of the Lite DETR paper, with what it reports.',
)
@shared_options(rounds=10, several_batch_sizes=True)
@click.option(
    '--dtype',
    type=click.Choice(DTYPES),
    default='float32',
    show_default=True,
    help='Other than float32: autocast.',
)
@click.option('--train', is_flag=True, help='Also measure a training step.')
@click.option('--count-only', is_flag=True, help='Count parameters and FLOPs, time nothing.')
@click.option(
    '--annotations',
    type=click.Path(path_type=Path),
    help='COCO annotations to measure AP on, for configs given with a checkpoint.',
)
@click.option('--images', type=click.Path(path_type=Path), help='Folder of their images.')
@click.option('--html', 'html_path', type=click.Path(dir_okay=False, path_type=Path))
def compare(
    configs,
    preset,
    image_size,
    batch_size,
    device,
    threads,
    rounds,
    warmup,
    json_path,
    markdown_path,
    dtype,
    train,
    count_only,
    annotations,
    images,
    html_path,
) -> None:
    """Compare detectors with the first one: FLOPs, parameters, time, memory, accuracy.

    A config is a path, mmdet::folder/config.py or mmlite::folder/config.py; a checkpoint may
    follow it after a comma. Without one the weights are random, which is all that cost and time
    need.

    \b
    Example:
      mmlite benchmark compare mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py \\
          'mmlite::lite_dino/lite-dino-4scale_r50_h3l1-2p1x3_8xb2-36e_coco.py' --html report.html
      mmlite benchmark compare stock.py,stock.pth lite.py,lite.pth --train \\
          --annotations val.json --images val/
      mmlite benchmark compare --preset paper-table3 --count-only
    """
    from ..analysis import compare_report
    from ..analysis.compare import Setting
    from ..analysis.compare import compare as compare_detectors
    from ..analysis.latency import describe_machine, num_threads

    groups = _subjects(configs, preset)
    dataset = _dataset(annotations, images)
    check_device(device)
    height, width = image_size
    setting = Setting(
        image_size,
        batch_size,
        device,
        dtype,
        0 if count_only else rounds,
        warmup,
        train,
        # Only the page plots cost against image size.
        sizes=tuple((height * s // 4, width * s // 4) for s in (2, 3, 5) if html_path),
    )
    with num_threads(threads), progress() as start:
        machine = describe_machine(device)
        results = [compare_detectors(group, setting, dataset, start) for group in groups]
    tables = compare_report.tables(results, setting)
    command = shlex.join(['mmlite', *sys.argv[1:]])
    report = {
        'machine': machine,
        'settings': asdict(setting),
        'command': command,
        'results': [result.as_json() for group in results for result in group],
    }
    notes = []
    if preset:
        notes.append(
            "Published figures are the paper's: another image size and counting rule, and none of "
            'them measured here.'
        )
    deliver(report, tables, notes, json_path, markdown_path)
    if html_path:
        html_path.write_text(compare_report.page(results, setting, tables, machine, command, notes))


def _subjects(configs: tuple[str, ...], preset: str | None) -> list[list]:
    from ..analysis.compare import Subject
    from ..analysis.published import preset as rows_of

    if bool(configs) == bool(preset):
        raise ValueError('give either configs, the baseline first, or a --preset')
    if preset:
        return [[Subject(row.config, published=row) for row in group] for group in rows_of(preset)]
    pairs = [config.partition(',') for config in configs]
    return [[Subject(config, checkpoint or None) for config, _, checkpoint in pairs]]


def _dataset(annotations: Path | None, images: Path | None):
    from ..analysis.accuracy import Dataset

    if (annotations is None) != (images is None):
        raise ValueError('--annotations and --images go together')
    return None if annotations is None else Dataset(annotations, images)


def check_device(device: str) -> None:
    """Refuse a device that is not there before any work is done."""
    import torch

    try:
        torch.empty(1, device=device)
        if torch.device(device).type == 'cuda':
            torch.cuda.set_device(device)  # events and Triton's launches belong to the current one
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
