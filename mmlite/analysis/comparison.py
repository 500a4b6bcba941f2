"""``mmlite benchmark compare`` and ``encoder``: models against their baseline, in one run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch

from .. import ops
from ..export.pytorch import pytorch_detector
from .accuracy import Dataset
from .contestants import EAGER, FUSED, Model, exported
from .report import Report, Table, giga, size, time_tables
from .timing import Setting, Start, silent, take_turns

_PAGE = {
    'title': 'What a variant saves',
    'intro': 'FLOPs are those of one image and count one multiply-add as one.',
    'how': 'Every model is timed in every round, in an order that turns around from round to '
    'round. "Faster" is the median over pairs of rounds of baseline time over own time, with its '
    'quartiles. Memory is the peak beyond weights and images. Models without a checkpoint have '
    'random weights, which hardly changes their time.',
}


def compare(
    groups: Iterable[Sequence[Model]],
    setting: Setting,
    modes: Sequence[str] = (EAGER,),
    *,
    runtimes: Sequence[str] = ('pytorch',),
    forms: Sequence[str] = (),
    int8: bool = False,
    dataset: Dataset | None = None,
    profile: bool = False,
    start: Start = silent,
) -> Report:
    """Measure groups of models, in all modes that they can run in, against the first of each.

    One group is in memory at a time, and counted before anything is timed, so bad input costs no
    work. ``modes`` are of :data:`~mmlite.analysis.contestants.MODES`. ``runtimes`` other than
    ``'pytorch'`` run exports of the models: in ``forms``, or without any the first model plainly
    and the others with our operators, and in OpenVINO with ``int8`` also in 8 bits. The accuracy
    of models with a checkpoint is measured on ``dataset``. With ``profile`` the tables of torch's
    profiler are among the notes.
    """
    others = [runtime for runtime in runtimes if runtime != 'pytorch'] if setting.rounds else []
    if int8 and 'openvino' not in runtimes:
        raise ValueError('--int8 is for OpenVINO; add --runtime openvino')
    models: list[Model] = []
    notes: list[str] = []
    for group in groups:
        notes += [each.note for each in group if each.note]
        step = start('counting', len(group))
        for each in group:
            each.cost = each.count(setting)
            if dataset is not None and each.checkpoint:
                detector = pytorch_detector(each.model.eval(), each.model.cfg)
                each.accuracy = dataset.evaluate(detector)
            step()
        running = []
        if 'pytorch' in runtimes or not others:
            running += _in_modes(group, modes if setting.rounds else (EAGER,), notes)
        if others:
            running += exported(group, others, forms, int8, setting.image_size, start)
        fused = next((each for each in running if each.mode == FUSED), None)
        against = {
            'faster': lambda each: each.baseline,
            'faster than stock, our op': lambda each, fused=fused: fused,
        }
        for each in running:
            each.baseline = running[0]
        take_turns(running, setting, start, against=against)
        for each in running:
            notes += [_profile(each, setting)] if profile else []
            each.model = None
        models += running
    if any(each.published for each in models):
        notes.append("Published figures are the paper's; none of them was measured here.")
    kernels = next(backend for backend in ops.backends() if backend.name == 'cpu')
    if torch.device(setting.device).type == 'cpu' and not kernels.available:
        notes.append(f'Our CPU kernels did not run: {kernels.detail}.')
    page = {**_PAGE, 'bars': {each.name: each.cost.stage_flops for each in models if each.cost}}
    return Report(asdict(setting), models, _tables(models, setting), notes, page)


def _in_modes(group: Sequence[Model], modes: Sequence[str], notes: list[str]) -> list[Model]:
    """The models in every mode that they run in, the baseline eagerly in any case."""
    running = [group[0]]
    for each, mode in itertools.product(group, modes):
        try:
            running.append(each.in_mode(mode))
        except ValueError as error:
            notes.append(f'Not measured: {each.name}, {mode}: {error}.')
    return list(dict.fromkeys(running))


def _profile(each: Model, setting: Setting) -> str:
    """The table of torch's profiler, of one call."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # it would report that it runs
    call = each.call('inference', setting, setting.batch_sizes[0])
    with torch.profiler.profile() as run:
        call(0)
    order = f'self_{torch.device(setting.device).type}_time_total'
    table = run.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40)
    return f'Profile of {each.name}:\n\n```\n{table}\n```\n'


def _tables(models: Sequence[Model], setting: Setting) -> list[Table]:
    """Cost first, then time and memory, accuracy and the published figures."""
    accuracy = [
        {**each.label(), **{metric: f'{value:.1f}' for metric, value in each.accuracy.items()}}
        for each in models
        if each.accuracy
    ]
    image = setting.image_size
    what = f'one image of {size(image)}' if image else 'the given inputs'
    cost = [_cost(each) for each in models if each.cost]
    published = [_published(each) for each in models if each.published]
    tables = [
        Table(f'GFLOPs, whole and by stage, {what}', cost),
        *time_tables(models, setting, setting.device),
        Table('Accuracy, measured', accuracy),
        Table('Published (the paper) beside measured (another image size and rule)', published),
    ]
    return [table for table in tables if table.cells]


def _cost(each: Model) -> dict:
    cost = each.cost
    share = f'{cost.flops / each.baseline.cost.flops:.0%}'
    whole = {'params M': f'{cost.params / 1e6:.2f}', 'all': giga(cost.flops), 'of baseline': share}
    stages = {stage: giga(flops) for stage, flops in cost.stage_flops.items() if flops}
    # Mask2Former starts with the smallest map.
    tokens = ' + '.join(map(str, sorted(cost.level_tokens, reverse=True)))
    return {**each.label(), **whole, **stages, 'tokens by level': tokens or '-'}


def _published(each: Model) -> dict:
    paper, first, cost = each.published, each.baseline, each.cost
    encoder = cost.stage_flops['encoder']
    theirs = paper['encoder_gflops'] / first.published['encoder_gflops']
    ours = encoder / first.cost.stage_flops['encoder']
    row = {**each.label(), 'published AP': f'{paper["ap"]:.1f}'}
    for what, published, measured in (
        ('GFLOPs', f'{paper["gflops"]:g}', giga(cost.flops)),
        ('encoder', f'{paper["encoder_gflops"]:g}', giga(encoder)),
        ('encoder saving', f'{1 - theirs:.0%}', f'{1 - ours:.0%}'),
        ('params M', f'{paper["params"]:g}', f'{cost.params / 1e6:.1f}'),
    ):
        row |= {f'published {what}': published, f'measured {what}': measured}
    return row
