"""``mmlite benchmark``: operators, encoders and whole detectors against each other.

A kind of benchmark is a function that turns its options into a
:class:`~mmlite.analysis.report.Report`; :func:`kind` gives it the options that all have and does
what is done alike before and after.
"""

from __future__ import annotations

import functools
import shlex
import sys
import warnings
from collections.abc import Callable

import click

from . import shared
from .shared import (
    count_option,
    device_option,
    file_option,
    flag,
    json_option,
    option,
    path_option,
)

DTYPES = click.Choice(['float32', 'bfloat16', 'float16'])

modes_option = option(
    '--mode',
    'modes',
    type=click.Choice(['eager', 'compiled', 'graph']),
    multiple=True,
    default=['eager'],
    help='How the encoder runs: as it stands, through torch.compile, or, for inference on a GPU, '
    'as a CUDA graph. Give it more than once for more.',
)


@click.group(context_settings=shared.HELP)
def benchmark() -> None:
    """Measure operators, encoders or detectors against each other, paired, in one run.

    \b
    Example:
      mmlite benchmark ops
      mmlite benchmark encoder
      mmlite benchmark compare mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py VARIANT.py
      mmlite benchmark transformers
      mmlite benchmark deploy LITE_CONFIG.py
    """
    warnings.filterwarnings('ignore')  # those of the stack about itself bury the table


def kind(several_batch_sizes: bool = False, dtype_help: str = 'Other than float32: autocast.'):
    """Make a subcommand of a function that returns a report.

    The function is called with its own options and with ``image_size``, ``batch_size``, ``dtype``,
    ``device``, ``rounds``, ``warmup`` and ``start``, the progress bar.

    Args:
        several_batch_sizes (bool): Whether ``--batch-size`` may be given more than once.
        dtype_help (str): Help of ``--dtype``.
    """
    batch_size = {'default': 1}
    if several_batch_sizes:
        batch_size = {'default': [1], 'multiple': True, 'help': 'Give it more than once for more.'}
    options = (
        shared.image_size_option(),
        count_option('--batch-size', **batch_size),
        option('--dtype', type=DTYPES, default='float32', help=dtype_help),
        device_option,
        count_option('--threads', help='CPU threads. Default: all cores.'),
        count_option('--rounds', default=10, help='Measurements of each contestant.'),
        count_option('--warmup', default=2),
        json_option,
        file_option('--markdown', 'markdown_path'),
    )

    def decorate(function: Callable) -> click.Command:
        @functools.wraps(function)
        def run(device, threads, json_path, markdown_path, **own) -> None:
            from ..analysis.latency import describe_machine, num_threads

            shared.check_device(device)
            with num_threads(threads), shared.progress() as start:
                machine = describe_machine(device)
                report = function(device=device, start=start, **own)
            report.machine = machine
            report.command = shlex.join(['mmlite', *sys.argv[1:]])
            shared.console().print(report.machine_line)
            for table in report.tables:
                shared.print_table(table.title, table.columns, table.rows, justify='right')
            for note in report.notes:
                shared.console().print(note)
            shared.write_json(json_path, report.as_json())
            if markdown_path:
                markdown_path.write_text(report.markdown())
            if report.page:
                own['html_path'].write_text(report.html())

        for add in reversed(options):
            run = add(run)
        return benchmark.command(name=function.__name__)(run)

    return decorate


@kind(dtype_help='Of features and weights.')
@count_option('--queries', 'num_queries', help='Number of queries. Default: all tokens.')
@count_option('--heads', 'num_heads', default=8)
@count_option('--head-dim', default=32)
@count_option('--points', 'num_points', default=4)
@option(
    '--locations',
    type=click.Choice(['grid', 'uniform']),
    default='grid',
    help='Sampling locations around each query as in a model, or anywhere.',
)
@flag('--forward-only', help='Leave out the backward pass.')
@flag('--scaling', help='Also vary image size, queries and threads.')
def ops(*, dtype, forward_only, scaling, rounds, warmup, start, **shape):
    """Measure every backend of the operators against plain PyTorch and mmcv's operator.

    So are deformops and Hugging Face's kernel, where they are installed. Ratios are medians over
    pairs of rounds, with their quartiles. Memory is the peak beyond the inputs. Bandwidth counts
    every input once and the output once.

    \b
    Example:
      mmlite benchmark ops
      mmlite benchmark ops --threads 1 --scaling --json ops.json
      mmlite benchmark ops --device cuda --dtype float16 --batch-size 8
    """
    import torch

    from ..analysis.operators import PASSES, Shape, report

    shape = Shape(dtype=getattr(torch, dtype), **shape)
    return report(shape, PASSES[: 1 if forward_only else 2], rounds, warmup, scaling, start)


@kind()
@option(
    '--schedule',
    'schedules',
    multiple=True,
    default=['H3L1-(2+1)x3'],
    help='A Lite schedule of six layers over four levels; give it more than once for more.',
)
@modes_option
@count_option('--ffn', default=2048, help='2048 in DINO, 1024 in Deformable DETR.')
@flag('--train', help='Also measure a training step.')
@flag('--profile', help='Also show where the time goes.')
def encoder(*, schedules, modes, ffn, batch_size, train, profile, start, **setting):
    """Measure MMDetection's encoder, the same on our operator, and Lite schedules.

    All have six layers over four levels and random weights. A training step is a forward and a
    backward pass; memory is the peak beyond parameters and inputs. What a mode cannot run is left
    out of it, and named below the table.

    \b
    Example:
      mmlite benchmark encoder
      mmlite benchmark encoder --device cuda --mode eager --mode compiled --mode graph
      mmlite benchmark encoder --train --profile --json encoder.json
      mmlite benchmark encoder --schedule 'H2L2-(2+1)x3' --schedule 'H3L1-(6+1)x1' --ffn 1024
    """
    from ..analysis.encoders import report
    from ..analysis.setting import Setting

    setting = Setting(batch_sizes=(batch_size,), training=train, **setting)
    return report(setting, schedules, ffn, profile, start, modes)


@kind(several_batch_sizes=True)
@click.argument('configs', nargs=-1, metavar='BASELINE VARIANT...')
@option(
    '--preset',
    type=click.Choice(['paper-table3', 'paper-table4']),
    help='Instead of configs: every row of a table of the Lite DETR paper, with what it reports.',
)
@modes_option
@flag('--train', help='Also measure a training step.')
@flag('--count-only', help='Count parameters and FLOPs, time nothing.')
@path_option(
    '--annotations',
    help='COCO annotations to measure AP on, for configs given with a checkpoint.',
)
@path_option('--images', help='Folder of their images.')
@file_option('--html', 'html_path', help='Write a page with plots here.')
def compare(
    *,
    configs,
    preset,
    modes,
    batch_size,
    rounds,
    train,
    count_only,
    annotations,
    images,
    html_path,
    start,
    **setting,
):
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
    from ..analysis import compare_report, published
    from ..analysis.accuracy import Dataset
    from ..analysis.compare import compare as compare_detectors
    from ..analysis.published import DetectorSpec
    from ..analysis.setting import Setting

    if bool(configs) == bool(preset):
        raise ValueError('give either configs, the baseline first, or a --preset')
    if (annotations is None) != (images is None):
        raise ValueError('--annotations and --images go together')
    groups = [[DetectorSpec.parse(config) for config in configs]]
    if preset:
        groups = [
            [DetectorSpec(row.config, published=row) for row in group]
            for group in published.preset(preset)
        ]
    rounds = 0 if count_only else rounds
    setting = Setting(batch_sizes=batch_size, rounds=rounds, training=train, **setting)
    dataset = Dataset(annotations, images) if annotations else None
    # Only the page plots cost against image size.
    height, width = setting.image_size
    sizes = [(height * s // 4, width * s // 4) for s in (2, 3, 5) if html_path]
    results = [compare_detectors(group, setting, dataset, sizes, start, modes) for group in groups]
    return compare_report.report(results, setting, with_page=bool(html_path))


@kind()
@click.argument('names', nargs=-1, metavar='[MODEL]...')
@option('--schedule', help="Of the Lite encoder; each model's own by default.")
def transformers(*, names, schedule, batch_size, start, **setting):
    """Measure models of Hugging Face transformers: stock, on our operators, and Lite.

    They are made from configs, with random weights: deformable-detr, grounding-dino, mask2former;
    all of them by default.

    \b
    Example:
      mmlite benchmark transformers --threads 2
      mmlite benchmark transformers mask2former --rounds 2 --warmup 1
    """
    from ..analysis.huggingface import report
    from ..analysis.setting import Setting

    return report(Setting(batch_sizes=(batch_size,), **setting), names, schedule, start)


@kind()
@click.argument('config')
@option(
    '--runtime',
    'runtimes',
    type=click.Choice(['pytorch', 'onnxruntime', 'openvino']),
    multiple=True,
    default=['pytorch', 'onnxruntime', 'openvino'],
    help='Give it more than once for more.',
)
@option(
    '--part',
    'parts',
    type=click.Choice(['detector', 'encoder']),
    multiple=True,
    default=['detector', 'encoder'],
    help='The whole detector, its encoder alone, or both.',
)
@flag('--int8', help='Also in 8 bits, in OpenVINO; needs NNCF.')
@path_option('--exports', 'folder', help='Keep exports here, and use those that are here again.')
def deploy(*, config, runtimes, parts, int8, folder, batch_size, start, **setting):
    """Measure a Lite detector and its stock one in PyTorch, ONNX Runtime and OpenVINO.

    In the runtimes both run exported plainly, in the runtime's own operators, and on ours. Weights
    are random. Exports take minutes: with --exports a second run has them already.

    \b
    Example:
      mmlite benchmark deploy CONFIG --threads 2 --int8 --exports work_dirs/exports
      mmlite benchmark deploy CONFIG --part encoder --runtime openvino --rounds 4
    """
    from ..analysis import deploy
    from ..analysis.setting import Setting

    names = dict(zip(('pytorch', 'onnxruntime', 'openvino'), deploy.RUNTIMES))
    return deploy.report(
        config,
        Setting(batch_sizes=(batch_size,), **setting),
        [names[runtime] for runtime in runtimes],
        parts,
        int8,
        folder,
        start,
    )
