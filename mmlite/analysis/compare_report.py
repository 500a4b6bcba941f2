"""``mmlite benchmark compare``: what to compare, and the results as tables, plots and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import ops
from ..openmmlab.build import DetectorSpec
from .accuracy import METRICS
from .compare import PYTORCH, Contestant, Result, build_detectors, compare
from .complexity import STAGES
from .published import OTHER_WORK
from .published import preset as published_rows
from .report import (
    BASELINE,
    COLORS,
    VARIANT,
    Report,
    Table,
    giga,
    mebibytes,
    milliseconds,
    plot,
    scatter,
    size,
    timing_columns,
)
from .timing import Setting, Start, silent, speedup


def report(
    names: Sequence[str],
    setting: Setting,
    *,
    framework: str = 'mmdet',
    preset: str | None = None,
    schedule: str | None = None,
    runtimes: Sequence[str] = (PYTORCH,),
    int8: bool = False,
    exports: Path | None = None,
    with_page: bool = False,
    start: Start = silent,
    **options: Any,
) -> Report:
    """All that ``mmlite benchmark compare`` measures.

    Args:
        names (Sequence[str]): Configs, the baseline first, or models of transformers.
        setting (Setting): What to run.
        framework (str): ``mmdet`` or ``transformers``.
        preset (str, optional): Instead of names, a table of the paper.
        schedule (str, optional): Of transformers' Lite encoder, in place of each model's own.
        runtimes (Sequence[str]): Of :data:`~mmlite.analysis.compare.RUNTIMES`.
        int8 (bool): Also measure exports in 8 bits.
        exports (Path, optional): Where exports are kept; those that lie there are used again.
        with_page (bool): Whether to draw what the page shows.
        start (Start): Shows progress.
        **options: Further arguments of :func:`~mmlite.analysis.compare.compare`.

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
    results, notes = [], []
    with TemporaryDirectory() as folder:
        for group in _groups(names, framework, preset, schedule, setting, start):
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
    page = None
    if with_page:
        page = {
            'headline': _headline(results, setting),
            'figures': _figures(results, setting),
            'size': size(setting.image_size),
        }
    return Report(asdict(setting), results, _tables(results, setting), notes, page=page)


def _groups(
    names: Sequence[str],
    framework: str,
    preset: str | None,
    schedule: str | None,
    setting: Setting,
    start: Start,
) -> Iterator[list[Contestant]]:
    """Contestants, each group with its baseline first, one group in memory at a time."""
    if framework == 'transformers':
        from .huggingface import make_contestants

        yield from make_contestants(names, schedule, setting.device)
        return
    if bool(names) == bool(preset):
        raise ValueError('give either configs, the baseline first, or a --preset')
    if not preset:
        specs = [DetectorSpec.parse(name) for name in names]
        yield build_detectors(specs, setting.device, start)
        return
    for rows in published_rows(preset):
        specs = [DetectorSpec(row.config) for row in rows]
        detectors = build_detectors(specs, setting.device, start)
        for detector, row in zip(detectors, rows):
            detector.name, detector.published = f'{row.model}, {row.backbone}', row
        yield detectors


def _tables(results: Sequence[Result], setting: Setting) -> list[Table]:
    """Cost first, then time, memory, stages, accuracy and the published figures."""
    name = {'detector': lambda r: r.name}
    counted = [r for r in results if r.runtime == PYTORCH]
    where = f'{size(setting.image_size)}, {setting.dtype}'
    shown = []

    def add(title: str, columns: dict[str, Callable], wanted: Sequence[Result]) -> None:
        if wanted:
            shown.append(Table.of(title, wanted, {**name, **columns}))

    def per_item(head: str, items: Callable[[Result], list], cell: Callable) -> dict[str, Callable]:
        """A column for each item; a dash where a detector has fewer."""
        return {
            f'{head} {i + 1}': lambda r, i=i: cell(r, items(r)[i]) if i < len(items(r)) else '-'
            for i in range(max(len(items(r)) for r in results))
        }

    def tokens(r: Result) -> list[int]:
        return sorted(r.complexity.level_tokens, reverse=True)  # Mask2Former starts with the least

    add(
        f'GFLOPs, whole and by stage, one image of {size(setting.image_size)}',
        {
            'params M': lambda r: f'{r.complexity.params / 1e6:.2f}',
            'all': lambda r: giga(r.complexity.flops),
            'of baseline': lambda r: f'{r.complexity.flops / r.baseline.complexity.flops:.0%}',
            **{s: lambda r, s=s: giga(r.complexity.stage_flops[s]) for s in STAGES},
        },
        counted,
    )
    timed = [r for r in results if r.latency]
    same_runtime = {'faster than plain': lambda r: _faster_than_plain(r, results)}
    for b in setting.batch_sizes:
        add(
            f'Inference, batch {b}, {where}, {setting.device}: images to boxes',
            {
                **timing_columns(lambda r, b=b: r.latency[b]),
                'images/s': lambda r, b=b: f'{b / r.latency[b].median:.2f}',
                'faster': lambda r, b=b: r.faster(b),
                **(same_runtime if any(r.runtime != PYTORCH for r in results) else {}),
                'peak MiB': lambda r, b=b: mebibytes(r.memory[b]),
            },
            timed,
        )
    staged = [r for r in timed if r.stages]
    add(
        f'Inference by stage, ms, batch {setting.batch_size}',
        {s: lambda r, s=s: f'{milliseconds(r.stages[s])} ({_share(r, s):.0%})' for s in STAGES},
        staged,
    )

    def faster(*stages: str) -> Callable[[Result], str]:
        def ratio(r: Result) -> str:
            spent = [sum(one.stages[s] for s in stages) for one in (r.baseline, r)]
            return f'{spent[0] / spent[1]:.2f}x'

        return ratio

    add(
        'Encoder within the detector, alone and with the neck (Mask2Former: its pixel decoder)',
        {
            'encoder ms': lambda r: milliseconds(r.stages['encoder']),
            'faster': faster('encoder'),
            'with neck ms': lambda r: milliseconds(r.stages['encoder'] + r.stages['neck']),
            'with neck, faster': faster('encoder', 'neck'),
        },
        [r for r in staged if r.stages['encoder'] and r.baseline.stages],
    )
    add(
        'Encoder by layer, ms',
        per_item(
            'layer',
            lambda r: [s for s in r.stages if s.startswith('encoder.layers.')],
            lambda r, layer: milliseconds(r.stages[layer]),
        ),
        staged,
    )
    add(
        f'Encoder alone, batch {setting.batch_size}, {where}: tokens to memory',
        {
            **timing_columns(lambda r: r.encoder),
            'faster': lambda r: speedup(r.baseline.encoder, r.encoder),
        },
        [r for r in results if r.encoder],
    )
    add(
        f'Training step, batch {setting.batch_size}, {where}: forward, losses, backward',
        {
            **timing_columns(lambda r: r.training),
            'faster': lambda r: speedup(r.baseline.training, r.training),
            'peak MiB': lambda r: mebibytes(r.training_memory),
        },
        [r for r in results if r.training],
    )
    layers = per_item(
        'layer', lambda r: r.complexity.encoder_layer_flops, lambda r, flops: giga(flops)
    )
    add('Encoder by layer, GFLOPs', layers, counted)
    levels = per_item('level', tokens, lambda r, count: f'{count} ({count / sum(tokens(r)):.0%})')
    total = {'all': lambda r: sum(tokens(r))}
    add('Tokens of each level (share), largest map first', {**levels, **total}, counted)
    add(
        'Accuracy, measured',
        {m: lambda r, m=m: f'{r.accuracy[m]:.1f}' for m in METRICS.values()},
        [r for r in results if r.accuracy],
    )

    def saved(encoder: Callable[[Result], float]) -> Callable[[Result], str]:
        return lambda r: f'{1 - encoder(r) / encoder(r.baseline):.0%}'

    add(
        'Published (COCO val2017, the paper) beside measured (here; another image size and rule)',
        {
            'published AP': lambda r: f'{r.published.ap:.1f}',
            'published GFLOPs': lambda r: f'{r.published.gflops:g}',
            'measured GFLOPs': lambda r: giga(r.complexity.flops),
            'published encoder': lambda r: f'{r.published.encoder_gflops:g}',
            'measured encoder': lambda r: giga(_encoder_flops(r)),
            'published encoder saving': saved(lambda r: r.published.encoder_gflops),
            'measured encoder saving': saved(_encoder_flops),
            'published params M': lambda r: f'{r.published.params:g}',
            'measured params M': lambda r: f'{r.complexity.params / 1e6:.1f}',
        },
        [r for r in results if r.published],
    )
    return shown


def _encoder_flops(result: Result) -> int:
    return result.complexity.stage_flops['encoder']


def _share(result: Result, stage: str) -> float:
    return result.stages[stage] / sum(result.stages[s] for s in STAGES)


def _faster_than_plain(result: Result, results: Sequence[Result]) -> object:
    """Than the baseline, exported plainly for the same runtime."""
    for other in results:
        is_plain = (other.runtime, other.form) == (result.runtime, 'plain')
        if is_plain and other.baseline is result.baseline:
            return speedup(next(iter(other.latency.values())), next(iter(result.latency.values())))
    return '-'


def _headline(results: Sequence[Result], setting: Setting) -> list[dict]:
    """For each variant what it saves, for the top of the page."""
    cards = []
    for result in results:
        baseline, facts = result.baseline, []
        if result is baseline:
            continue
        if result.latency:
            faster = result.faster(setting.batch_size)
            facts.append((f'{faster.median:.2f}x', 'faster inference'))
        if result.training:
            faster = speedup(baseline.training, result.training)
            facts.append((f'{faster.median:.2f}x', 'faster training'))
        fewer = 1 - result.complexity.flops / baseline.complexity.flops
        facts.append((f'{fewer:.0%}', 'fewer FLOPs'))
        if _encoder_flops(baseline):
            fewer = 1 - _encoder_flops(result) / _encoder_flops(baseline)
            facts.append((f'{fewer:.0%}', 'fewer in the encoder'))
        cards.append({'name': result.name, 'where': f'against {baseline.name}', 'facts': facts})
    return cards


def _figures(results: Sequence[Result], setting: Setting) -> list[tuple[str, str]]:
    """(caption, SVG) of every plot that the results allow."""
    shown = []
    if any(r.published or r.accuracy for r in results):
        shown.append(('AP against GFLOPs of the encoder', plot(_accuracy_against_cost, results)))
    if staged := [r for r in results if r.stages]:
        shares = [[100 * _share(r, stage) for stage in STAGES] for r in staged]
        drawn = plot(_bars, staged, shares, '% of the time')
        shown.append(('Share of the time by stage', drawn))
    costs = [[r.complexity.stage_flops[stage] / 1e9 for stage in STAGES] for r in results]
    shown.append(('GFLOPs by stage', plot(_bars, results, costs, 'GFLOPs')))
    baselines = [r for r in results if r is r.baseline]
    for baseline in baselines:
        group = [r for r in results if r.baseline is baseline]
        family = f': {baseline.name}' if len(baselines) > 1 else ''
        if baseline.latency:
            drawn = plot(_latency_against_cost, group, setting.batch_size)
            shown.append((f'Time against GFLOPs{family}', drawn))
        if len(baseline.flops_by_size) > 1:
            shown.append((f'GFLOPs against image size{family}', plot(_cost_against_size, group)))
    return shown


def _accuracy_against_cost(axes: Any, results: Sequence[Result]) -> None:
    points, legend = [], {}
    for r in results:
        if r.published:
            legend['published (blue: squares baselines, dots Lite)'] = True
            name = r.published.model.removeprefix('Lite ')
            style = {'marker': 's' if r is r.baseline else 'o', 'color': COLORS[0]}
            points.append((name, r.published.encoder_gflops, r.published.ap, style))
        if r.accuracy:
            legend['stars measured here'] = True
            style = {'marker': '*', 'color': VARIANT, 'markersize': 10}
            points.append((_short(r), _encoder_flops(r) / 1e9, r.accuracy['mAP'], style))
    if any(name == 'Deformable DETR' for name, *_ in points):
        for name, (x, y) in OTHER_WORK.items():
            shown = name.partition(',')[0] if name.endswith(('0.1', 'DETR')) else ''
            points.append((shown, x, y, {'marker': 'x', 'color': '#999999'}))
    axes.set_title('; '.join(legend), fontsize=8, color='#555555')
    axes.margins(y=0.1)
    scatter(axes, points, 'encoder GFLOPs', 'AP')


def _latency_against_cost(axes: Any, group: Sequence[Result], batch_size: int) -> None:
    points = []
    for r in group:
        mark, color = ('s', BASELINE) if r is r.baseline else ('o', VARIANT)
        x, y = r.complexity.flops / 1e9, 1000 * r.latency[batch_size].median
        points.append((_short(r), x, y, {'marker': mark, 'color': color}))
    axes.set_ylim(0, 1.1 * max(y for _, _, y, _ in points))
    scatter(axes, points, 'GFLOPs', f'median ms, batch {batch_size}')


def _bars(axes: Any, results: Sequence[Result], values: list[list[float]], label: str) -> None:
    rows = range(len(results))
    left = [0.0] * len(results)
    for index, stage in enumerate(STAGES):
        widths = [row[index] for row in values]
        axes.barh(rows, widths, left=left, color=COLORS[index], label=stage, height=0.7)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_yticks(rows, [_short(result) for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(ncols=3, fontsize=8, frameon=False, loc='lower center', bbox_to_anchor=(0.4, 1.0))


def _cost_against_size(axes: Any, group: Sequence[Result]) -> None:
    for index, result in enumerate(group):
        sizes = [map(int, text.split('x')) for text in result.flops_by_size]
        pixels = [height * width / 1e6 for height, width in sizes]
        flops = [count / 1e9 for count in result.flops_by_size.values()]
        color = BASELINE if index == 0 else COLORS[(index - 1) % len(COLORS)]
        axes.plot(pixels, flops, 'o-', color=color, label=_short(result), markersize=3)
    axes.set_xlabel('megapixels')
    axes.set_ylabel('GFLOPs')
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)


def _short(result: Result, most: int = 32) -> str:
    return result.name if len(result.name) <= most else f'{result.name[: most - 1]}…'
