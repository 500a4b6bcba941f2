"""``mmlite benchmark compare`` and ``encoder``: what to compare, and the tables of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import ops
from ..openmmlab.build import DetectorSpec, load_config
from .compare import PYTORCH, Contestant, Result, compare
from .complexity import STAGES
from .contestants import EMBED_DIMS, STOCK_FUSED, build_detectors, build_encoders
from .inputs import pyramid_sizes
from .profile import profile_table
from .published import preset as published_rows
from .report import Report, Table, giga, mebibytes, milliseconds, size, times
from .timing import Setting, Start, Timing, silent, speedup

Cells = dict[str, object]
# What else a time is compared with, beside the baseline: head of the column, and which result.
Also = tuple[str, Callable[[Result], 'Result | None']]


def compare_models(
    names: Sequence[str],
    setting: Setting,
    *,
    framework: str = 'mmdet',
    preset: str | None = None,
    changes: dict | None = None,
    schedule: str | None = None,
    runtimes: Sequence[str] = (PYTORCH,),
    int8: bool = False,
    exports: Path | None = None,
    with_page: bool = False,
    start: Start = silent,
    **options: Any,
) -> Report:
    """All that ``mmlite benchmark compare`` measures.

    ``names`` are configs, the baseline first, or models of transformers; instead of them ``preset``
    may name a table of the paper. ``changes`` are those of ``--cfg-options``. Exports are kept in
    ``exports``, and those that lie there are used again. ``options`` go to
    :func:`~mmlite.analysis.compare.compare`.

    Raises:
        FileNotFoundError: A config, checkpoint, annotation file or a runtime's operators are
            missing.
        ValueError: What is asked for cannot be measured; the message says why.
        ImportError: A runtime is missing.
    """
    if with_page:  # only the page plots cost against image size
        height, width = setting.image_size
        options['sizes'] = [(height * s // 4, width * s // 4) for s in (2, 3, 5)]
    elsewhere = [runtime for runtime in runtimes if runtime != PYTORCH]
    if framework == 'transformers':
        from .huggingface import make_contestants

        groups = make_contestants(names, schedule, setting.device)
    else:
        groups = _groups(names, preset, changes, setting.device, start)
    results, notes = [], []
    with TemporaryDirectory() as folder:
        for group in groups:
            if elsewhere:
                from .exported import export_all

                parts = options.get('parts', ('detector',))
                arguments = (elsewhere, setting, exports or Path(folder), int8, parts, start)
                options['exported'] = export_all(group, *arguments)
            found, remarks = compare(group, setting, start=start, **options)
            results += found
            notes += remarks
    if any(result.published for result in results):
        notes.append(
            "Published figures are the paper's: another image size and counting rule, and none of "
            'them measured here.'
        )
    notes += [
        f'{result.name}: the outputs differ by at most {result.difference:.1e}.'
        for result in results
        if result.difference is not None
    ]
    if torch.device(setting.device).type == 'cpu':
        notes += [
            f'Our CPU kernels did not run: {backend.detail}.'
            for backend in ops.backends()
            if backend.name == 'cpu' and not backend.available
        ]
    plain = {(id(r.baseline), r.runtime): r for r in results if r.form == 'plain'}
    also = ('faster than plain', lambda r: plain.get((id(r.baseline), r.runtime)))
    page = None
    if with_page:
        from .page import page_of

        page = page_of(results, setting)
    return Report(asdict(setting), results, tables(results, setting, also), notes, page=page)


def _groups(
    names: Sequence[str], preset: str | None, changes: dict | None, device: str, start: Start
) -> Iterator[list[Contestant]]:
    """Contestants, each group with its baseline first, one group in memory at a time."""
    if bool(names) == bool(preset):
        raise ValueError('give either configs, the baseline first, or a --preset')
    if not preset:
        specs = [DetectorSpec.parse(name) for name in names]
        wanted = [(spec.name, load_config(spec.config, changes), spec.checkpoint) for spec in specs]
        yield build_detectors(wanted, device, start)
        return
    for rows in published_rows(preset):
        wanted = [
            (f'{row.model}, {row.backbone}', load_config(row.config, changes), None) for row in rows
        ]
        detectors = build_detectors(wanted, device, start)
        for detector, row in zip(detectors, rows):
            detector.published = row
        yield detectors


def compare_encoders(
    setting: Setting,
    schedules: Sequence[str],
    ffn_channels: int,
    modes: Sequence[str],
    profile: bool = False,
    start: Start = silent,
) -> Report:
    """All that ``mmlite benchmark encoder`` measures.

    ``ffn_channels`` is the hidden size of the FFN: 2048 in DINO, 1024 in Deformable DETR. With
    ``profile`` it also says where the time of inference goes.

    Raises:
        ValueError: A schedule is malformed or does not make six layers over four levels.
    """
    encoders = build_encoders(schedules, ffn_channels, setting.device)
    results, notes = compare(encoders, setting, modes=modes, start=start)
    fused = next((result for result in results if result.name == STOCK_FUSED), None)
    tokens = sum(h * w for h, w in pyramid_sizes(setting.image_size))
    notes.insert(0, f'Over {tokens} tokens of {EMBED_DIMS} channels, FFN {ffn_channels}.')
    settings = {**asdict(setting), 'embed_dims': EMBED_DIMS, 'ffn_channels': ffn_channels}
    shown = tables(results, setting, ('faster than stock, our op', lambda r: fused))
    found = Report({**settings, 'modes': modes}, results, shown, notes)
    if profile:
        calls = {e.name: (e.model, e.inference(setting, setting.batch_size)) for e in encoders}
        table, found.further = profile_table(calls, setting)
        found.tables.append(table)
    return found


def tables(results: Sequence[Result], setting: Setting, also: Also) -> list[Table]:
    """Cost first, then time, memory, stages, accuracy and the published figures.

    A section is a title, the rows it is for, and what gives the cells of a row.
    """
    counted = [r for r in results if r.runtime == PYTORCH]
    timed = [r for r in results if r.latency]
    staged = [r for r in timed if r.stages]
    where = f'{size(setting.image_size)}, {setting.dtype}'
    batch = setting.batch_size

    def ratios(r: Result, timing: Callable[[Result], Timing | None]) -> Cells:
        cells: Cells = {'faster': speedup(timing(r.baseline), timing(r))}
        other = also[1](r)
        if other is not None and timing(other) is not None:
            cells[also[0]] = speedup(timing(other), timing(r))
        return cells

    def inference(batch: int) -> Callable[[Result], Cells]:
        return lambda r: {
            **times(r.latency[batch]),
            'images/s': f'{batch / r.latency[batch].median:.2f}',
            **ratios(r, lambda r: r.latency[batch]),
            'peak MiB': mebibytes(r.memory[batch]),
        }

    sections = [
        (f'GFLOPs, whole and by stage, one image of {size(setting.image_size)}', counted, _cost),
        *(
            (
                f'Inference, batch {b}, {where}, {setting.device}: images to boxes',
                timed,
                inference(b),
            )
            for b in setting.batch_sizes
        ),
        (f'Inference by stage, ms, batch {batch}', staged, _stages),
        (
            'Encoder within the detector, alone and with the neck (Mask2Former: its pixel decoder)',
            [r for r in staged if r.stages['encoder'] and r.baseline.stages],
            _encoder_and_neck,
        ),
        (
            'Encoder by layer, ms',
            [r for r in staged if 'encoder.layers.0' in r.stages],
            lambda r: _by_layer(milliseconds, [s for n, s in r.stages.items() if '.layers.' in n]),
        ),
        (
            f'Encoder alone, batch {batch}, {where}: tokens to memory',
            [r for r in results if r.encoder],
            lambda r: {**times(r.encoder), **ratios(r, lambda r: r.encoder)},
        ),
        (
            f'Training step, batch {batch}, {where}: forward, losses, backward',
            [r for r in results if r.training],
            lambda r: {
                **times(r.training),
                **ratios(r, lambda r: r.training),
                'peak MiB': mebibytes(r.training_memory),
            },
        ),
        (
            'Encoder by layer, GFLOPs',
            [r for r in counted if r.complexity.encoder_layer_flops],
            lambda r: _by_layer(giga, r.complexity.encoder_layer_flops),
        ),
        ('Tokens of each level (share), largest map first', counted, _tokens),
        (
            'Accuracy, measured',
            [r for r in results if r.accuracy],
            lambda r: {metric: f'{value:.1f}' for metric, value in r.accuracy.items()},
        ),
        (
            'Published (COCO val2017, the paper) beside measured (here; another image size and '
            'rule)',
            [r for r in results if r.published],
            _published,
        ),
    ]
    return [
        Table(title, [{'model': r.name, **cells(r)} for r in rows])
        for title, rows, cells in sections
        if rows
    ]


def _cost(r: Result) -> Cells:
    cost = r.complexity
    return {
        'params M': f'{cost.params / 1e6:.2f}',
        'all': giga(cost.flops),
        'of baseline': f'{cost.flops / r.baseline.complexity.flops:.0%}',
        **{stage: giga(flops) for stage, flops in cost.stage_flops.items() if flops},
    }


def _stages(r: Result) -> Cells:
    all_of_them = sum(r.stages[stage] for stage in STAGES)
    return {
        stage: f'{milliseconds(r.stages[stage])} ({r.stages[stage] / all_of_them:.0%})'
        for stage in STAGES
    }


def _encoder_and_neck(r: Result) -> Cells:
    cells: Cells = {}
    for stages, head, ratio in (
        (['encoder'], 'encoder ms', 'faster'),
        (['encoder', 'neck'], 'with neck ms', 'with neck, faster'),
    ):
        before, now = (sum(one.stages[s] for s in stages) for one in (r.baseline, r))
        cells |= {head: milliseconds(now), ratio: f'{before / now:.2f}x'}
    return cells


def _by_layer(text: Callable[[float], str], values: Sequence[float]) -> Cells:
    return {f'layer {index + 1}': text(value) for index, value in enumerate(values)}


def _tokens(r: Result) -> Cells:
    tokens = sorted(r.complexity.level_tokens, reverse=True)  # Mask2Former starts with the least
    shares = {f'level {i + 1}': f'{n} ({n / sum(tokens):.0%})' for i, n in enumerate(tokens)}
    return {**shares, 'all': sum(tokens)}


def _published(r: Result) -> Cells:
    paper, encoder = r.published, r.complexity.stage_flops['encoder']
    published = paper.encoder_gflops / r.baseline.published.encoder_gflops
    measured = encoder / r.baseline.complexity.stage_flops['encoder']
    return {
        'published AP': f'{paper.ap:.1f}',
        'published GFLOPs': f'{paper.gflops:g}',
        'measured GFLOPs': giga(r.complexity.flops),
        'published encoder': f'{paper.encoder_gflops:g}',
        'measured encoder': giga(encoder),
        'published encoder saving': f'{1 - published:.0%}',
        'measured encoder saving': f'{1 - measured:.0%}',
        'published params M': f'{paper.params:g}',
        'measured params M': f'{r.complexity.params / 1e6:.1f}',
    }
