"""``mmlite benchmark``: operators, encoders and whole detectors against each other."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable

import click

from . import shared
from .shared import count_option, flag, option


@click.group(context_settings=shared.HELP)
def benchmark() -> None:
    """Measure operators, encoders or detectors against each other, paired, in one run.

    \b
    Example:
      mmlite benchmark compare mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py VARIANT.py
    """


def kind(function: Callable) -> click.Command:
    """A subcommand of a function that returns a :class:`~mmlite.analysis.report.Report`.

    The function gets its own options, ``setting``, a :class:`~mmlite.analysis.timing.Setting`, and
    ``start``, the progress bar.
    """

    dtypes, many = click.Choice(['float32', 'bfloat16', 'float16']), 'Of models: one or more.'

    @benchmark.command()
    @shared.image_size_option()
    @count_option('--batch-size', 'batch_sizes', default=[1], multiple=True, help=many)
    @option('--dtype', type=dtypes, default='float32', help='Of operators, or autocast.')
    @shared.device_option
    @shared.threads_option
    @count_option('--rounds', default=10, help='Measurements of each contestant.')
    @count_option('--warmup', default=2)
    @shared.json_option
    @shared.file_option('--markdown', 'markdown_path', help='Write the tables here.')
    @functools.wraps(function)
    def run(json_path, markdown_path, html_path=None, train=False, count_only=False, **own) -> None:
        from ..analysis.timing import Setting, describe_machine

        names = own.keys() & {field.name for field in dataclasses.fields(Setting)}
        setting = Setting(**{name: own.pop(name) for name in names})
        parts = (*setting.parts, 'training') if train else setting.parts
        rounds = 0 if count_only else setting.rounds
        setting = dataclasses.replace(setting, parts=parts, rounds=rounds)
        with shared.progress() as start:
            report = function(setting=setting, start=start, **own)
        report.machine = describe_machine(setting.device)
        report.command = shlex.join(['mmlite', *sys.argv[1:]])
        shared.show(report, json_path, html_path, markdown_path)

    return run


def several(name: str, choices: str, help: str) -> Callable:
    """An option that may be given more than once, the first of its choices by default."""
    kind = click.Choice(choices.split())
    default = kind.choices[:1]
    return option(name, f'{name[2:]}s', type=kind, multiple=True, default=default, help=help)


train_flag = flag('--train', help='Also measure a training step.')


PLACES = 'Sampling locations around each query as in a model, or anywhere.'


@kind
@count_option('--queries', 'num_queries', help='Number of queries. Default: all tokens.')
@count_option('--heads', 'num_heads', default=8)
@count_option('--head-dim', default=32)
@count_option('--points', 'num_points', default=4)
@option('--locations', type=click.Choice(['grid', 'uniform']), default='grid', help=PLACES)
@flag('--forward-only', help='Leave out the backward pass.')
def ops(*, setting, forward_only, start, **shape):
    """Measure every backend of the operators against plain PyTorch and mmcv's operator.

    Ratios are medians over pairs of rounds, with their quartiles.

    \b
    Example:
      mmlite benchmark ops --device cuda --dtype float16 --batch-size 8
    """
    from ..analysis.operators import PASSES, benchmark_operators

    parts = PASSES[: 1 if forward_only else 2]
    return benchmark_operators(dataclasses.replace(setting, parts=parts), start, **shape)


@kind
@option('--schedule', 'schedules', multiple=True, default=['H3L1-(2+1)x3'], help='Of six layers.')
@several('--mode', 'eager compiled', 'How encoders run.')
@count_option('--ffn', default=2048, help='2048 in DINO, 1024 in Deformable DETR.')
@train_flag
@flag('--profile', help="Also print the tables of PyTorch's profiler.")
def encoder(*, schedules, ffn, setting, **how):
    """Measure MMDetection's encoder, the same on our operator, and Lite schedules.

    All have six layers over four levels and random weights. A training step is a forward and a
    backward pass; memory is the peak beyond parameters and inputs.

    \b
    Example:
      mmlite benchmark encoder --schedule 'H2L2-(2+1)x3' --schedule 'H3L1-(6+1)x1' --ffn 1024
    """
    from ..analysis.comparison import compare
    from ..analysis.contestants import encoders

    return compare([encoders(schedules, ffn, setting.device)], setting, **how)


@kind
@click.argument('names', nargs=-1, metavar='BASELINE VARIANT...')
@option('--preset', type=click.Choice(['paper-table3', 'paper-table4']), help='Instead of configs.')
@option('--framework', type=click.Choice(['mmdet', 'pytorch', 'transformers']), default='mmdet')
@option('--schedule', 'schedules', multiple=True, help='Of Lite encoders, outside mmdet.')
@several('--mode', 'eager compiled fused optimized', 'How models run in PyTorch.')
@several('--runtime', 'pytorch onnxruntime openvino', 'Others than pytorch run exports.')
@option('--form', 'forms', type=click.Choice(['plain', 'portable', 'ours']), multiple=True)
@flag('--int8', help='Also in 8 bits, in OpenVINO; needs NNCF.')
@several('--part', 'inference encoder', 'The whole model, or its encoder alone.')
@train_flag
@flag('--count-only', help='Count parameters and FLOPs, time nothing.')
@shared.dataset_options('COCO annotations: measure AP of configs with a checkpoint.', '--images')
@shared.cfg_options
@shared.file_option('--html', 'html_path', help='Write a page here.')
def compare(*, names, preset, framework, schedules, setting, start, dataset, cfg_options, **how):
    """Compare models with the first one: FLOPs, parameters, time, memory, accuracy.

    A config is a path, mmdet::folder/config.py or mmlite::folder/config.py; a checkpoint may
    follow it after a comma. Without one the weights are random, which is all that cost and time
    need. A single Lite config is compared with its stock one. A variant may also be a folder that
    mmlite export or mmlite quantize wrote; it runs in its own runtime.

    With --framework pytorch, FILE.py:FUNCTION names a function of yours that returns (model,
    inputs), inputs a tuple or a dict; transformers has deformable-detr, grounding-dino and
    mask2former. The model is measured as it is, on our operators, and Lite, with each --schedule
    or the main one that fits.

    A preset is a table of the Lite DETR paper, whose figures stand beside the measured ones.

    Modes: fused has standard attention on our operators, optimized is mmlite.optimize. Forms are
    what runtimes get: attention as MMCV writes it, without our operators, or on them. By default
    the baseline is plain, all else ours. Modes, runtimes, forms, parts, schedules and batch sizes
    may be given more than once.

    \b
    Example:
      mmlite benchmark compare stock.py,stock.pth lite.py,lite.pth --html report.html
      mmlite benchmark compare lite.py exported/ exported-int8/
      mmlite benchmark compare lite.py --runtime pytorch --runtime openvino --mode optimized --int8
      mmlite benchmark compare --framework pytorch mine.py:build --schedule 'H3L1-(2+1)x3'
    """
    from ..analysis import comparison

    if framework == 'mmdet':
        if schedules:
            raise ValueError('--schedule is for models of other frameworks; a config has its own')
        if names and preset:
            raise ValueError('give either configs, the baseline first, or a --preset')
        from ..analysis.contestants import detectors, published

        options = cfg_options, setting.device, start
        groups = published(preset, *options) if preset else [detectors(names, *options)]
        return comparison.compare(groups, setting, dataset=dataset, start=start, **how)
    given = preset or cfg_options or dataset or 'training' in setting.parts
    if given or how['runtimes'] != ('pytorch',):
        refused = '--preset, --cfg-options, --annotations, --images, --train and --runtime'
        raise ValueError(f'with --framework {framework} leave out {refused}')
    from ..analysis.pytorch import load_function, variants

    if framework == 'pytorch':
        builders = {name: load_function(name) for name in names[:1]}
        if len(names) != 1:
            raise ValueError('give one FILE.py:FUNCTION; its variants are made of it')
    else:
        from ..analysis.huggingface import MODELS

        if unknown := [name for name in names if name not in MODELS]:
            raise ValueError(f'{unknown[0]!r} is none of the models: {", ".join(MODELS)}')
        builders = {name: MODELS[name] for name in names or MODELS}
    groups = (variants(*builder, schedules, setting) for builder in builders.items())
    if framework == 'pytorch':
        (group,) = groups = list(groups)
        if not callable(group[0].inputs):
            setting = dataclasses.replace(setting, image_size=None)
    return comparison.compare(groups, setting, start=start, **how)
