"""``mmlite benchmark compare`` and ``encoder``: what to compare, and the tables of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
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
from .timing import Setting, Start, silent, speedup

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
    if with_page:  # only the page shows cost by image size
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

    A section is a title and what gives the cells of a row, none where it does not apply.
    """
    batch, where = setting.batch_size, f'{size(setting.image_size)}, {setting.dtype}'

    def timed(r: Result, pick: Callable, memory: int | None = None, images: int = 0) -> Cells:
        timing, other = pick(r), also[1](r)
        if timing is None:
            return {}
        cells = {**times(timing), 'faster': speedup(pick(r.baseline), timing)}
        if other is not None and pick(other) is not None:
            cells[also[0]] = speedup(pick(other), timing)
        if images:
            cells |= {'images/s': f'{images / timing.median:.2f}'}
        return cells if memory is None else {**cells, 'peak MiB': mebibytes(memory)}

    def inference(r: Result, b: int) -> Cells:
        return timed(r, lambda r: r.latency.get(b), r.memory.get(b), images=b)

    sections: dict[str, Callable[[Result], Cells]] = {
        f'GFLOPs, whole and by stage, one image of {size(setting.image_size)}': _cost,
        **{
            f'Inference, batch {b}, {where}, {setting.device}': partial(inference, b=b)
            for b in setting.batch_sizes
        },
        f'Inference by stage, ms, batch {batch}': _stages,
        f'Encoder alone, batch {batch}, {where}: tokens to memory': lambda r: timed(
            r, lambda r: r.encoder
        ),
        f'Training step, batch {batch}, {where}: forward, losses, backward': lambda r: timed(
            r, lambda r: r.training, r.training_memory
        ),
        'Encoder by layer, GFLOPs and ms': _layers,
        'Tokens of each level (share), largest map first': _tokens,
        'GFLOPs by image size': _sizes,
        'Accuracy, measured': lambda r: {m: f'{v:.1f}' for m, v in (r.accuracy or {}).items()},
        'Published (the paper) beside measured (another image size and rule)': _published,
    }
    found = []
    for title, section in sections.items():
        rows = [{'model': r.name, **cells} for r in results if (cells := section(r))]
        found += [Table(title, rows)] if rows else []
    return found


def _cost(r: Result) -> Cells:
    cost = r.complexity
    stages = {stage: giga(flops) for stage, flops in cost.stage_flops.items() if flops}
    share = f'{cost.flops / r.baseline.complexity.flops:.0%}'
    whole = {'params M': f'{cost.params / 1e6:.2f}', 'all': giga(cost.flops), 'of baseline': share}
    return {} if r.runtime != PYTORCH else {**whole, **stages}


def _stages(r: Result) -> Cells:
    if not r.stages:
        return {}
    whole = sum(r.stages[stage] for stage in STAGES)
    cells: Cells = {s: f'{milliseconds(r.stages[s])} ({r.stages[s] / whole:.0%})' for s in STAGES}
    if r.stages['encoder'] and r.baseline.stages:
        first, own = r.baseline.stages, r.stages
        both = own['encoder'] + own['neck']
        cells['encoder, faster'] = f'{first["encoder"] / own["encoder"]:.2f}x'
        cells['with neck, faster'] = f'{(first["encoder"] + first["neck"]) / both:.2f}x'
    return cells


def _layers(r: Result) -> Cells:
    cells = {}
    for index, flops in enumerate(r.complexity.encoder_layer_flops if r.runtime == PYTORCH else ()):
        seconds = r.stages.get(f'encoder.layers.{index}')
        time = '' if seconds is None else f', {milliseconds(seconds)} ms'
        cells[f'layer {index + 1}'] = giga(flops) + time
    return cells


def _tokens(r: Result) -> Cells:
    tokens = sorted(r.complexity.level_tokens, reverse=True)  # Mask2Former starts with the least
    if r.runtime != PYTORCH or not tokens:
        return {}
    shares = {f'level {i + 1}': f'{n} ({n / sum(tokens):.0%})' for i, n in enumerate(tokens)}
    return {**shares, 'all': sum(tokens)}


def _sizes(r: Result) -> Cells:
    if r.runtime != PYTORCH or len(r.flops_by_size) < 2:
        return {}
    return {image_size: giga(flops) for image_size, flops in r.flops_by_size.items()}


def _published(r: Result) -> Cells:
    if r.published is None:
        return {}
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
