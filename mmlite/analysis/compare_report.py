"""The comparison of detectors as tables, plots and the head of a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict

import matplotlib
from matplotlib.axes import Axes

from .accuracy import METRICS
from .compare import Result
from .complexity import STAGES
from .published import OTHER_WORK
from .report import Report, Table, giga, mebibytes, milliseconds, size, timing_columns
from .setting import Setting

Groups = Sequence[Sequence[Result]]

# One colour a stage, readable for the colour-blind (Okabe and Ito's palette).
_COLORS = ('#0072b2', '#56b4e9', '#d55e00', '#e69f00', '#009e73', '#999999')
_BASELINE, _VARIANT, _PUBLISHED = '#444444', '#d55e00', '#0072b2'


def report(groups: Groups, setting: Setting, with_page: bool) -> Report:
    """All that was measured.

    Args:
        groups (Sequence[Sequence[Result]]): Results of one ``compare`` each; the first of a
            group is the baseline of the others.
        setting (Setting): What they were measured with.
        with_page (bool): Whether to draw what the page shows.
    """
    results = [result for group in groups for result in group]
    notes = []
    if any(result.detector.published for result in results):
        notes.append(
            "Published figures are the paper's: another image size and counting rule, and none of "
            'them measured here.'
        )
    page = None
    if with_page:
        page = {
            'headline': _headline(groups, setting),
            'figures': _figures(groups, setting),
            'size': size(setting.image_size),
        }
    return Report(
        settings=asdict(setting),
        results=results,
        tables=_tables(groups, setting),
        notes=notes,
        page=page,
    )


def _tables(groups: Groups, setting: Setting) -> list[Table]:
    """Cost first, then time, memory, stages, accuracy and the published figures."""
    results = [result for group in groups for result in group]
    baselines = {id(result): group[0] for group in groups for result in group}
    name = {'detector': lambda r: r.name}
    where = f'{size(setting.image_size)}, {setting.dtype}'
    layers = max(len(r.complexity.encoder_layer_flops) for r in results)
    levels = max(len(r.complexity.level_tokens) for r in results)
    shown = []

    def add(title: str, columns: dict[str, Callable], wanted: Sequence[Result] = results) -> None:
        if wanted:
            shown.append(Table.of(title, wanted, {**name, **columns}))

    def of_layers(cell: Callable[[Result, int], str]) -> dict[str, Callable]:
        """A column a layer; a dash where a detector has fewer."""
        return {
            f'layer {i + 1}': lambda r, i=i: (
                cell(r, i) if i < len(r.complexity.encoder_layer_flops) else '-'
            )
            for i in range(layers)
        }

    def share(part: float, whole: float) -> str:
        return f'{part / whole:.0%}'

    def tokens(level: int) -> Callable[[Result], str]:
        def cell(r: Result) -> str:
            own = sorted(
                r.complexity.level_tokens, reverse=True
            )  # Mask2Former starts with the smallest
            return f'{own[level]} ({share(own[level], sum(own))})' if level < len(own) else '-'

        return cell

    add(
        f'GFLOPs, whole and by stage, one image of {size(setting.image_size)}',
        {
            'params M': lambda r: f'{r.complexity.params / 1e6:.2f}',
            'all': lambda r: giga(r.complexity.flops),
            'of baseline': lambda r: share(r.complexity.flops, baselines[id(r)].complexity.flops),
            **{s: lambda r, s=s: giga(r.complexity.stage_flops[s]) for s in STAGES},
        },
    )
    timed = [r for r in results if r.latency]
    for b in setting.batch_sizes:
        add(
            f'Inference, batch {b}, {where}, {setting.device}: images to boxes',
            {
                **timing_columns(lambda r, b=b: r.latency[b]),
                'images/s': lambda r, b=b: f'{b / r.latency[b].median:.2f}',
                'faster': lambda r, b=b: r.faster[b],
                'peak MiB': lambda r, b=b: mebibytes(r.memory[b]),
            },
            timed,
        )
    add(
        f'Inference by stage, ms, batch {setting.batch_size}',
        {
            s: lambda r, s=s: f'{milliseconds(r.stages[s])} ({_stage_shares(r)[s]:.0%})'
            for s in STAGES
        },
        timed,
    )

    def encoder_ms(r: Result, with_neck: bool = False) -> float:
        return r.stages['encoder'] + with_neck * r.stages['neck']

    def faster(with_neck: bool = False) -> Callable[[Result], str]:
        return lambda r: (
            f'{encoder_ms(baselines[id(r)], with_neck) / encoder_ms(r, with_neck):.2f}x'
        )

    add(
        'Encoder, alone and with the neck (Mask2Former: its pixel decoder), by the profiler',
        {
            'encoder ms': lambda r: milliseconds(encoder_ms(r)),
            'faster': faster(),
            'with neck ms': lambda r: milliseconds(encoder_ms(r, True)),
            'with neck, faster': faster(True),
        },
        [r for r in timed if r.stages['encoder']],
    )
    add(
        'Encoder by layer, ms',
        of_layers(lambda r, i: milliseconds(r.stages[f'encoder.layers.{i}'])),
        timed,
    )
    add(
        f'Training step, batch {setting.batch_size}, {where}: forward, losses, backward',
        {
            **timing_columns(lambda r: r.training),
            'faster': lambda r: r.training_faster,
            'peak MiB': lambda r: mebibytes(r.training_memory),
        },
        [r for r in results if r.training],
    )
    add(
        'Encoder by layer, GFLOPs',
        of_layers(lambda r, i: giga(r.complexity.encoder_layer_flops[i])),
    )
    add(
        'Tokens of each level (share), largest map first',
        {
            **{f'level {i + 1}': tokens(i) for i in range(levels)},
            'all': lambda r: sum(r.complexity.level_tokens),
        },
    )
    add(
        'Accuracy, measured',
        {m: lambda r, m=m: f'{r.accuracy[m]:.1f}' for m in METRICS.values()},
        [r for r in results if r.accuracy],
    )

    def encoder(r: Result) -> int:
        return r.complexity.stage_flops['encoder']

    def published_saving(r: Result) -> float:
        stock = baselines[id(r)].detector.published
        return 1 - r.detector.published.encoder_gflops / stock.encoder_gflops

    add(
        'Published (COCO val2017, the paper) beside measured (here; another image size and rule)',
        {
            'published AP': lambda r: f'{r.detector.published.ap:.1f}',
            'published GFLOPs': lambda r: f'{r.detector.published.gflops:g}',
            'measured GFLOPs': lambda r: giga(r.complexity.flops),
            'published encoder': lambda r: f'{r.detector.published.encoder_gflops:g}',
            'measured encoder': lambda r: giga(encoder(r)),
            'published encoder saving': lambda r: f'{published_saving(r):.0%}',
            'measured encoder saving': lambda r: (
                f'{1 - encoder(r) / encoder(baselines[id(r)]):.0%}'
            ),
            'published params M': lambda r: f'{r.detector.published.params:g}',
            'measured params M': lambda r: f'{r.complexity.params / 1e6:.1f}',
        },
        [r for r in results if r.detector.published],
    )
    return shown


def _stage_shares(result: Result) -> dict[str, float]:
    seconds = {stage: result.stages[stage] for stage in STAGES}
    return {stage: part / sum(seconds.values()) for stage, part in seconds.items()}


def _headline(groups: Groups, setting: Setting) -> list[dict]:
    """For each variant what it saves, for the top of the page."""
    cards = []
    for baseline, result in ((group[0], result) for group in groups for result in group[1:]):
        facts = []
        if result.latency:
            facts.append((f'{result.faster[setting.batch_size].median:.2f}x', 'faster inference'))
        if result.training:
            facts.append((f'{result.training_faster.median:.2f}x', 'faster training'))
        own, stock = result.complexity, baseline.complexity
        facts.append((f'{1 - own.flops / stock.flops:.0%}', 'fewer FLOPs'))
        if stock.stage_flops['encoder']:
            saved = 1 - own.stage_flops['encoder'] / stock.stage_flops['encoder']
            facts.append((f'{saved:.0%}', 'fewer in the encoder'))
        cards.append({'name': result.name, 'baseline': baseline.name, 'facts': facts})
    return cards


def _figures(groups: Groups, setting: Setting) -> list[tuple[str, str]]:
    """(caption, SVG) of every plot that the results allow."""
    results = [result for group in groups for result in group]
    shown = []
    if any(result.detector.published or result.accuracy for result in results):
        shown.append(('AP against GFLOPs of the encoder', _plot(_accuracy_against_cost, groups)))
    if any(result.latency for result in results):
        shares = [[100 * share for share in _stage_shares(r).values()] for r in results]
        shown.append(('Share of the time by stage', _plot(_bars, results, shares, '% of the time')))
    costs = [[r.complexity.stage_flops[stage] / 1e9 for stage in STAGES] for r in results]
    shown.append(('GFLOPs by stage', _plot(_bars, results, costs, 'GFLOPs')))
    for group in groups:
        family = f': {group[0].name}' if len(groups) > 1 else ''
        if group[0].latency:
            plot = _plot(_latency_against_cost, group, setting.batch_size)
            shown.append((f'Time against GFLOPs{family}', plot))
        if len(group[0].flops_by_size) > 1:
            shown.append((f'GFLOPs against image size{family}', _plot(_cost_against_size, group)))
    return shown


def _plot(draw: Callable[..., None], *arguments) -> str:
    from matplotlib.figure import Figure

    # Drawn at the width of a phone, so that the text keeps its size there.
    style = {'svg.fonttype': 'none', 'font.size': 9, 'font.family': 'sans-serif'}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 3.3), layout='constrained')
        axes = figure.add_subplot()
        axes.spines[['top', 'right']].set_visible(False)
        draw(axes, *arguments)
        target = io.StringIO()
        # No date, so that equal results make equal pages.
        figure.savefig(target, format='svg', metadata={'Date': None}, transparent=True)
    svg = target.getvalue()
    return svg[svg.index('<svg') :]


def _accuracy_against_cost(axes: Axes, groups: Groups) -> None:
    points, legend = [], {}
    for result, is_baseline in ((r, r is group[0]) for group in groups for r in group):
        published = result.detector.published
        if published:
            legend['published (blue: squares baselines, dots Lite)'] = True
            name = published.model.removeprefix('Lite ')
            style = {'marker': 's' if is_baseline else 'o', 'color': _PUBLISHED}
            points.append((name, published.encoder_gflops, published.ap, style))
        if result.accuracy:
            legend['stars measured here'] = True
            x, y = result.complexity.stage_flops['encoder'] / 1e9, result.accuracy['mAP']
            style = {'marker': '*', 'color': _VARIANT, 'markersize': 10}
            points.append((_short(result), x, y, style))
    if any(name == 'Deformable DETR' for name, *_ in points):
        for name, (x, y) in OTHER_WORK.items():
            shown = name.partition(',')[0] if name.endswith(('0.1', 'DETR')) else ''
            points.append((shown, x, y, {'marker': 'x', 'color': '#999999'}))
    axes.set_title('; '.join(legend), fontsize=8, color='#555555')
    axes.margins(y=0.1)
    _scatter(axes, points, 'encoder GFLOPs', 'AP')


def _latency_against_cost(axes: Axes, group: Sequence[Result], batch_size: int) -> None:
    points = []
    for result in group:
        x, y = result.complexity.flops / 1e9, 1000 * result.latency[batch_size].median
        mark, color = ('s', _BASELINE) if result is group[0] else ('o', _VARIANT)
        points.append((_short(result), x, y, {'marker': mark, 'color': color}))
    axes.set_ylim(0, 1.1 * max(y for _, _, y, _ in points))
    _scatter(axes, points, 'GFLOPs', f'median ms, batch {batch_size}')


def _scatter(
    axes: Axes, points: list[tuple[str, float, float, dict]], x_label: str, y_label: str
) -> None:
    """Points with names, from the lowest up, each high enough to clear the one below it."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for _, x, y, style in points:
        axes.plot(x, y, **style)
    axes.set_xlim(0, 1.4 * axes.get_xlim()[1])
    (_, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set_autoscale_on(False)
    below = -1.0
    for name, x, y, _ in sorted(points, key=lambda point: point[2]):
        if name:
            below = max((y - bottom) / (top - bottom), below + 0.055)
            axes.annotate(
                name,
                (x, y),
                xytext=(x + 0.03 * right, below),
                textcoords=('data', 'axes fraction'),
                fontsize=7,
                va='center',
                arrowprops={'arrowstyle': '-', 'lw': 0.4, 'color': '#999999', 'shrinkA': 0},
            )


def _bars(axes: Axes, results: Sequence[Result], values: list[list[float]], label: str) -> None:
    rows = range(len(results))
    left = [0.0] * len(results)
    for index, stage in enumerate(STAGES):
        widths = [row[index] for row in values]
        axes.barh(rows, widths, left=left, color=_COLORS[index], label=stage, height=0.7)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_yticks(rows, [_short(result) for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(ncols=3, fontsize=8, frameon=False, loc='lower center', bbox_to_anchor=(0.4, 1.0))


def _cost_against_size(axes: Axes, group: Sequence[Result]) -> None:
    for index, result in enumerate(group):
        sizes = [map(int, text.split('x')) for text in result.flops_by_size]
        pixels = [height * width / 1e6 for height, width in sizes]
        flops = [count / 1e9 for count in result.flops_by_size.values()]
        color = _BASELINE if index == 0 else _COLORS[(index - 1) % len(_COLORS)]
        axes.plot(pixels, flops, 'o-', color=color, label=_short(result), markersize=3)
    axes.set_xlabel('megapixels')
    axes.set_ylabel('GFLOPs')
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)


def _short(result: Result, most: int = 32) -> str:
    return result.name if len(result.name) <= most else f'{result.name[: most - 1]}…'
