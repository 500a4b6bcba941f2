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
from .shared import count_option, file_option, flag, option, path_option


@click.group(context_settings=shared.HELP)
def benchmark() -> None:
    """Measure operators, encoders or detectors against each other, paired, in one run.

    \b
    Example:
      mmlite benchmark ops
      mmlite benchmark encoder
      mmlite benchmark compare mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py VARIANT.py
    """
    warnings.filterwarnings('ignore')  # those of the stack about itself bury the table


def kind(function: Callable) -> click.Command:
    """A subcommand of a function that returns a report.

    The function gets its own options, ``setting``, a :class:`~mmlite.analysis.timing.Setting`, and
    ``start``, the progress bar.
    """

    @functools.wraps(function)
    def run(device, threads, json_path, markdown_path, rounds, batch_size, **own) -> None:
        from ..analysis.timing import Setting, describe_machine, num_threads

        shared.check_device(device)
        fields = {name: own.pop(name) for name in ('image_size', 'dtype', 'warmup')}
        rounds = 0 if own.pop('count_only', False) else rounds
        training = own.pop('train', False)
        setting = Setting(
            **fields, batch_sizes=batch_size, device=device, rounds=rounds, training=training
        )
        with num_threads(threads), shared.progress() as start:
            machine = describe_machine(device)
            report = function(setting=setting, start=start, **own)
        report.machine = machine
        report.command = shlex.join(['mmlite', *sys.argv[1:]])
        console = shared.console()
        console.print(report.machine_line)
        for table in report.tables:
            shared.print_table(table.title, table.columns, table.rows, justify='right')
        for note in report.notes:
            console.print(note)
        shared.write_json(json_path, report.as_json())
        if markdown_path:
            markdown_path.write_text(report.markdown())
        if report.page:
            own['html_path'].write_text(report.html())

    dtypes = click.Choice(['float32', 'bfloat16', 'float16'])
    batch_help = 'Images at a time. Models take several: give it more than once.'
    for add in (
        file_option('--markdown', 'markdown_path', help='Write the tables here.'),
        shared.json_option,
        count_option('--warmup', default=2),
        count_option('--rounds', default=10, help='Measurements of each contestant.'),
        shared.threads_option,
        shared.device_option,
        option('--dtype', type=dtypes, default='float32', help='Of operators, or autocast.'),
        count_option('--batch-size', default=[1], multiple=True, help=batch_help),
        shared.image_size_option(),
    ):
        run = add(run)
    return benchmark.command()(run)


def several(name: str, choices: str, help: str) -> Callable:
    """An option that may be given more than once, the first of its choices by default."""
    words = choices.split()
    help = f'{help} Give it more than once for more.'
    destination = f'{name[2:]}s'
    choice = click.Choice(words)
    return option(name, destination, type=choice, multiple=True, default=words[:1], help=help)


@kind
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
def ops(*, setting, forward_only, scaling, start, **shape):
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

    from ..analysis.inputs import OperatorShape
    from ..analysis.operators import PASSES, report

    if len(setting.batch_sizes) > 1:
        raise ValueError('ops takes one --batch-size; run it once for each')
    shape = OperatorShape(
        setting.image_size,
        setting.batch_size,
        **shape,
        dtype=getattr(torch, setting.dtype),
        device=setting.device,
    )
    passes = PASSES[: 1 if forward_only else 2]
    return report(shape, passes, setting.rounds, setting.warmup, scaling, start)


@kind
@option(
    '--schedule',
    'schedules',
    multiple=True,
    default=['H3L1-(2+1)x3'],
    help='A Lite schedule of six layers over four levels; give it more than once for more.',
)
@several('--mode', 'eager compiled graph', 'graph: as a CUDA graph, for inference.')
@count_option('--ffn', default=2048, help='2048 in DINO, 1024 in Deformable DETR.')
@flag('--train', help='Also measure a training step.')
@flag('--profile', help='Also show where the time goes.')
def encoder(*, setting, schedules, modes, ffn, profile, start):
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
    from ..analysis.comparison import compare_encoders

    return compare_encoders(setting, schedules, ffn, modes, profile, start)


@kind
@click.argument('names', nargs=-1, metavar='BASELINE VARIANT...')
@option(
    '--framework',
    type=click.Choice(['mmdet', 'transformers']),
    default='mmdet',
    help='Of transformers name deformable-detr, grounding-dino or mask2former; all by default.',
)
@option(
    '--preset',
    type=click.Choice(['paper-table3', 'paper-table4']),
    help='Instead of configs: every row of a table of the Lite DETR paper, with what it reports.',
)
@option('--schedule', help="Of transformers' Lite encoder; each model's own by default.")
@several('--mode', 'eager compiled graph fused optimized', 'How models run in PyTorch.')
@several('--runtime', 'pytorch onnxruntime openvino', 'Others than pytorch run exports.')
@several('--part', 'detector encoder', 'The whole, or the encoder alone.')
@flag('--int8', help='Also in 8 bits, in OpenVINO; needs NNCF.')
@path_option('--exports', help='Keep exports here, and use those that are here again.')
@flag('--train', help='Also measure a training step.')
@flag('--count-only', help='Count parameters and FLOPs, time nothing.')
@path_option('--annotations', help='COCO annotations: measure AP of configs with a checkpoint.')
@path_option('--images', help='Folder of their images.')
@shared.cfg_options
@file_option('--html', 'html_path', help='Write a page with plots here.')
def compare(*, setting, annotations, images, cfg_options, html_path, **own):
    """Compare models with the first one: FLOPs, parameters, time, memory, accuracy.

    A config is a path, mmdet::folder/config.py or mmlite::folder/config.py; a checkpoint may
    follow it after a comma. Without one the weights are random, which is all that cost and time
    need. A single Lite config is compared with its stock one.

    Modes: fused has standard attention on our operators, optimized is mmlite.optimize. Exports run
    plain, in our portable form, and on our operators.

    \b
    Example:
      mmlite benchmark compare mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py \\
          'mmlite::lite_dino/lite-dino-4scale_r50_h3l1-2p1x3_8xb2-36e_coco.py' --html report.html
      mmlite benchmark compare stock.py,stock.pth lite.py,lite.pth --train \\
          --annotations val.json --images val/
      mmlite benchmark compare --preset paper-table3 --count-only
      mmlite benchmark compare lite.py --runtime pytorch --runtime openvino --mode optimized --int8
      mmlite benchmark compare --framework transformers mask2former
    """
    from ..analysis.accuracy import Dataset
    from ..analysis.comparison import compare_models

    if (annotations is None) != (images is None):
        raise ValueError('--annotations and --images go together')
    dataset = Dataset(annotations, images) if annotations else None
    with_page = bool(html_path)
    return compare_models(
        setting=setting, dataset=dataset, changes=cfg_options, with_page=with_page, **own
    )
