"""The page of ``mmlite benchmark compare``: what each variant saves, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .compare import Result
from .complexity import STAGES
from .report import BASELINE, COLORS, VARIANT, plot, scatter, size
from .timing import Setting, speedup

_HOW = (
    'Every detector is timed in every round, in an order that turns around from round to round. '
    '"Faster" is the median over pairs of rounds of baseline time over own time, with its '
    'quartiles. Memory is the peak beyond weights and images. Detectors without a checkpoint have '
    'random weights, which changes neither their cost nor, to speak of, their time.'
)


def page_of(results: Sequence[Result], setting: Setting) -> dict:
    """What the page shows beside the tables; see :class:`~mmlite.analysis.report.Report`."""
    return {
        'title': 'What a variant saves',
        'intro': f'One image of {size(setting.image_size)} pixels unless a table says otherwise. '
        'FLOPs count one multiply-add as one.',
        'headline': [_card(r, setting) for r in results if r is not r.baseline],
        'figures': list(_figures(results, setting)),
        'how': _HOW,
    }


def _card(result: Result, setting: Setting) -> dict:
    baseline, facts = result.baseline, []
    if result.latency:
        faster = result.faster(setting.batch_size)
        facts.append((f'{faster.median:.2f}x', 'faster inference'))
    if result.training:
        faster = speedup(baseline.training, result.training)
        facts.append((f'{faster.median:.2f}x', 'faster training'))
    fewer = 1 - result.complexity.flops / baseline.complexity.flops
    facts.append((f'{fewer:.0%}', 'fewer FLOPs'))
    if _encoder(baseline):
        facts.append((f'{1 - _encoder(result) / _encoder(baseline):.0%}', 'fewer in the encoder'))
    return {'name': result.name, 'where': f'against {baseline.name}', 'facts': facts}


def _figures(results: Sequence[Result], setting: Setting):
    """(caption, SVG) of every plot that the results allow."""
    if any(r.published or r.accuracy for r in results):
        yield 'AP against GFLOPs of the encoder', plot(_accuracy, results)
    if staged := [r for r in results if r.stages]:
        times = [[1000 * r.stages[stage] for stage in STAGES] for r in staged]
        yield 'Time by stage', plot(_bars, staged, times, 'ms')
    costs = [[r.complexity.stage_flops[stage] / 1e9 for stage in STAGES] for r in results]
    yield 'GFLOPs by stage', plot(_bars, results, costs, 'GFLOPs')
    for baseline in (r for r in results if r is r.baseline):
        group = [r for r in results if r.baseline is baseline]
        if baseline.latency:
            caption = f'Time against GFLOPs: {baseline.name}'
            yield caption, plot(_latency, group, setting.batch_size)


def _accuracy(axes: Any, results: Sequence[Result]) -> None:
    points = []
    for r in results:
        if r.published:
            name = r.published.model.removeprefix('Lite ')
            style = {'marker': 's' if r is r.baseline else 'o', 'color': COLORS[0]}
            points.append((name, r.published.encoder_gflops, r.published.ap, style))
        if r.accuracy:
            style = {'marker': '*', 'color': VARIANT, 'markersize': 10}
            points.append((_short(r), _encoder(r) / 1e9, r.accuracy['mAP'], style))
    axes.set_title('published blue (squares baselines), measured here stars', fontsize=8)
    axes.margins(y=0.1)
    scatter(axes, points, 'encoder GFLOPs', 'AP')


def _latency(axes: Any, group: Sequence[Result], batch_size: int) -> None:
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


def _encoder(result: Result) -> int:
    return result.complexity.stage_flops['encoder']


def _short(result: Result, most: int = 32) -> str:
    return result.name if len(result.name) <= most else f'{result.name[: most - 1]}…'
