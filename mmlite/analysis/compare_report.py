"""The comparison of detectors as tables, plots and a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache

import jinja2
import matplotlib

from .accuracy import METRICS
from .compare import Result, Setting
from .complexity import STAGES
from .published import PEERS
from .report import Table, giga, mebibytes, milliseconds, timing_cells

Groups = Sequence[Sequence[Result]]

# One colour a stage, readable for the colour-blind (Okabe and Ito's palette).
_COLORS = ('#0072b2', '#56b4e9', '#d55e00', '#e69f00', '#009e73', '#999999')
_BASELINE, _VARIANT, _PUBLISHED = '#444444', '#d55e00', '#0072b2'


def tables(groups: Groups, setting: Setting) -> list[Table]:
    """All that was measured, for people.

    Args:
        groups (Sequence[Sequence[Result]]): Results of one ``compare`` each; the first of a
            group is the baseline of the others.
        setting (Setting): What they were measured with.

    Returns:
        list[Table]: Cost first, then time, memory, stages, accuracy and the published figures,
        as far as they are there.
    """
    results = [result for group in groups for result in group]
    shown = [_cost(groups, setting)]
    if any(result.latency for result in results):
        shown += [_latency(results, setting, batch) for batch in setting.batch_sizes]
        shown.append(_stages(results, setting))
        shown.append(_layers(results, 'ms', lambda r, i: milliseconds(_layer_seconds(r, i))))
    if any(result.training for result in results):
        shown.append(_training(results, setting))
    shown.append(_layers(results, 'GFLOPs', lambda r, i: giga(r.complexity.encoder_layer_flops[i])))
    shown.append(_tokens(results))
    if any(result.accuracy for result in results):
        shown.append(_accuracy(results))
    if any(result.subject.published for result in results):
        shown.append(_published(groups))
    return shown


def _cost(groups: Groups, setting: Setting) -> Table:
    table = Table(
        f'GFLOPs, whole and by stage, one image of {_size(setting.image_size)}',
        ('detector', 'params M', 'all', 'of baseline', *STAGES),
    )
    for group in groups:
        baseline = group[0].complexity
        for result in group:
            cost = result.complexity
            table.rows.append(
                (
                    result.name,
                    f'{cost.params / 1e6:.2f}',
                    giga(cost.flops),
                    f'{cost.flops / baseline.flops:.0%}',
                    *(giga(cost.stage_flops[stage]) for stage in STAGES),
                )
            )
    return table


def _latency(results: Sequence[Result], setting: Setting, batch: int) -> Table:
    table = Table(
        f'Inference, batch {batch}, {_size(setting.image_size)}, {setting.dtype}, '
        f'{setting.device}: images to boxes',
        ('detector', 'median ms', 'mean ms', 'p95 ms', 'images/s', 'faster', 'peak MiB'),
    )
    for result in results:
        timing = result.latency[batch]
        table.rows.append(
            (
                result.name,
                *timing_cells(timing),
                f'{batch / timing.median:.2f}',
                str(result.faster[batch]),
                mebibytes(result.memory[batch]),
            )
        )
    return table


def _training(results: Sequence[Result], setting: Setting) -> Table:
    table = Table(
        f'Training step, batch {setting.batch_sizes[0]}, {_size(setting.image_size)}, '
        f'{setting.dtype}: forward, losses, backward',
        ('detector', 'median ms', 'mean ms', 'p95 ms', 'faster', 'peak MiB'),
    )
    for result in results:
        table.rows.append(
            (
                result.name,
                *timing_cells(result.training),
                str(result.training_faster),
                mebibytes(result.training_memory),
            )
        )
    return table


def _stages(results: Sequence[Result], setting: Setting) -> Table:
    table = Table(f'Inference by stage, ms, batch {setting.batch_sizes[0]}', ('detector', *STAGES))
    for result in results:
        shares = _stage_shares(result)
        table.rows.append(
            (
                result.name,
                *(
                    f'{milliseconds(result.stages.get(stage, 0.0))} ({share:.0%})'
                    for stage, share in zip(STAGES, shares)
                ),
            )
        )
    return table


def _stage_shares(result: Result) -> list[float]:
    seconds = [result.stages.get(stage, 0.0) for stage in STAGES]
    return [part / sum(seconds) for part in seconds]


def _layer_seconds(result: Result, index: int) -> float:
    return result.stages[f'encoder.layers.{index}']


def _layers(results: Sequence[Result], unit: str, cell) -> Table:
    count = max(len(result.complexity.encoder_layer_flops) for result in results)
    table = Table(
        f'Encoder by layer, {unit}', ('detector', *(f'layer {i + 1}' for i in range(count)))
    )
    for result in results:
        own = len(result.complexity.encoder_layer_flops)
        table.rows.append(
            (result.name, *(cell(result, i) if i < own else '-' for i in range(count)))
        )
    return table


def _tokens(results: Sequence[Result]) -> Table:
    levels = max(len(result.complexity.level_tokens) for result in results)
    table = Table(
        'Tokens of each level (share), largest map first',
        ('detector', *(f'level {i + 1}' for i in range(levels)), 'all'),
    )
    for result in results:
        tokens = result.complexity.level_tokens
        cells = [f'{count} ({count / sum(tokens):.0%})' for count in tokens]
        table.rows.append((result.name, *cells, *['-'] * (levels - len(tokens)), str(sum(tokens))))
    return table


def _accuracy(results: Sequence[Result]) -> Table:
    table = Table('Accuracy, measured', ('detector', *METRICS))
    for result in results:
        if result.accuracy:
            table.rows.append((result.name, *(f'{result.accuracy[m]:.1f}' for m in METRICS)))
    return table


def _published(groups: Groups) -> Table:
    table = Table(
        'Published (COCO val2017, the paper) beside measured (here; another image size and rule)',
        (
            *('detector', 'published AP', 'published GFLOPs', 'measured GFLOPs'),
            *('published encoder', 'measured encoder'),
            *('published encoder saving', 'measured encoder saving'),
            *('published params M', 'measured params M'),
        ),
    )
    for group in groups:
        baseline = group[0]
        for result in group:
            published, cost = result.subject.published, result.complexity
            if published is None:
                continue
            encoder, stock = cost.stage_flops['encoder'], baseline.complexity.stage_flops['encoder']
            paper = published.encoder_gflops / baseline.subject.published.encoder_gflops
            table.rows.append(
                (
                    result.name,
                    f'{published.ap:.1f}',
                    f'{published.gflops:g}',
                    giga(cost.flops),
                    f'{published.encoder_gflops:g}',
                    giga(encoder),
                    f'{1 - paper:.0%}',
                    f'{1 - encoder / stock:.0%}',
                    f'{published.params:g}',
                    f'{cost.params / 1e6:.1f}',
                )
            )
    return table


def page(
    groups: Groups,
    setting: Setting,
    shown: Sequence[Table],
    machine: dict[str, str],
    command: str,
    notes: Sequence[str] = (),
) -> str:
    """A page that stands alone: no network, no scripts, readable on a phone.

    Args:
        groups (Sequence[Sequence[Result]]): As for :func:`tables`.
        setting (Setting): What they were measured with.
        shown (Sequence[Table]): The tables.
        machine (dict[str, str]): What it ran on.
        command (str): What repeats it.
        notes (Sequence[str]): Sentences for the foot of the page.

    Returns:
        str: HTML.
    """
    return _template().render(
        headline=_headline(groups, setting),
        figures=plots(groups, setting),
        tables=shown,
        machine=machine,
        command=command,
        notes=notes,
        size=_size(setting.image_size),
    )


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('mmlite.analysis', 'templates'),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template('compare.html')


def _headline(groups: Groups, setting: Setting) -> list[dict]:
    """For each variant what it saves, for the top of the page."""
    cards = []
    for group in groups:
        baseline = group[0]
        for result in group[1:]:
            facts = []
            batch = setting.batch_sizes[0]
            if result.latency:
                facts.append((f'{result.faster[batch].median:.2f}x', 'faster inference'))
            if result.training:
                facts.append((f'{result.training_faster.median:.2f}x', 'faster training'))
            saved = 1 - result.complexity.flops / baseline.complexity.flops
            facts.append((f'{saved:.0%}', 'fewer FLOPs'))
            encoder = baseline.complexity.stage_flops['encoder']
            if encoder:
                share = 1 - result.complexity.stage_flops['encoder'] / encoder
                facts.append((f'{share:.0%}', 'fewer in the encoder'))
            cards.append({'name': result.name, 'baseline': baseline.name, 'facts': facts})
    return cards


def plots(groups: Groups, setting: Setting) -> list[tuple[str, str]]:
    """(caption, SVG) of every plot that the results allow."""
    results = [result for group in groups for result in group]
    shown = []
    if any(result.subject.published or result.accuracy for result in results):
        shown.append(('AP against GFLOPs of the encoder', _plot(_accuracy_against_cost, groups)))
    if any(result.latency for result in results):
        shown.append(('Share of the time by stage', _plot(_stage_bars, results)))
    shown.append(('GFLOPs by stage', _plot(_cost_bars, results)))
    for group in groups:
        family = f': {group[0].name}' if len(groups) > 1 else ''
        if group[0].latency:
            plot = _plot(_latency_against_cost, group, setting)
            shown.append((f'Time against GFLOPs{family}', plot))
        if len(group[0].flops_by_size) > 1:
            shown.append((f'GFLOPs against image size{family}', _plot(_cost_against_size, group)))
    return shown


def _plot(draw, *arguments) -> str:
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


def _accuracy_against_cost(axes, groups: Groups) -> None:
    labels = []
    for group in groups:
        for result in group:
            published = result.subject.published
            if published:
                is_baseline = result is group[0]
                x, y = published.encoder_gflops, published.ap
                axes.plot(x, y, 's' if is_baseline else 'o', color=_PUBLISHED)
                labels.append((published.model.removeprefix('Lite '), x, y))
            if result.accuracy:
                x, y = result.complexity.stage_flops['encoder'] / 1e9, result.accuracy['mAP']
                axes.plot(x, y, '*', color=_VARIANT, markersize=10)
                labels.append((_short(result), x, y))
    if any(text == 'Deformable DETR' for text, _, _ in labels):
        axes.plot([p.encoder_gflops for p in PEERS], [p.ap for p in PEERS], 'x', color='#999999')
        labels.append(('Sparse DETR', PEERS[0].encoder_gflops, PEERS[0].ap))
        labels.append((PEERS[-1].model, PEERS[-1].encoder_gflops, PEERS[-1].ap))
    legend = []
    if any(result.subject.published for group in groups for result in group):
        legend.append('published (blue: squares baselines, dots Lite)')
    if any(result.accuracy for group in groups for result in group):
        legend.append('stars measured here')
    axes.set_title('; '.join(legend), fontsize=8, color='#555555')
    axes.set_xlabel('encoder GFLOPs')
    axes.set_ylabel('AP')
    axes.set_xlim(0, 1.35 * axes.get_xlim()[1])
    axes.margins(y=0.1)
    _label(axes, labels)


def _latency_against_cost(axes, group: Sequence[Result], setting: Setting) -> None:
    batch = setting.batch_sizes[0]
    labels = []
    for result in group:
        x, y = result.complexity.flops / 1e9, 1000 * result.latency[batch].median
        mark, color = ('s', _BASELINE) if result is group[0] else ('o', _VARIANT)
        axes.plot(x, y, mark, color=color)
        labels.append((_short(result), x, y))
    axes.set_xlabel('GFLOPs')
    axes.set_ylabel(f'median ms, batch {batch}')
    axes.set_xlim(0, 1.5 * axes.get_xlim()[1])
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    _label(axes, labels)


def _label(axes, labels: list[tuple[str, float, float]]) -> None:
    """Name points, from the lowest up, each name high enough to clear the one below it."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set_autoscale_on(False)
    below = -1.0
    for text, x, y in sorted(labels, key=lambda label: label[2]):
        below = max((y - bottom) / (top - bottom), below + 0.055)
        axes.annotate(
            text,
            (x, y),
            xytext=(x + 0.03 * (right - left), below),
            textcoords=('data', 'axes fraction'),
            fontsize=7,
            va='center',
            arrowprops={'arrowstyle': '-', 'lw': 0.4, 'color': '#999999', 'shrinkA': 0},
        )


def _stage_bars(axes, results: Sequence[Result]) -> None:
    _bars(axes, results, [[100 * s for s in _stage_shares(r)] for r in results], '% of the time')


def _cost_bars(axes, results: Sequence[Result]) -> None:
    costs = [[r.complexity.stage_flops[stage] / 1e9 for stage in STAGES] for r in results]
    _bars(axes, results, costs, 'GFLOPs')


def _bars(axes, results: Sequence[Result], values: list[list[float]], label: str) -> None:
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


def _cost_against_size(axes, group: Sequence[Result]) -> None:
    for index, result in enumerate(group):
        pixels = [height * width / 1e6 for height, width in result.flops_by_size]
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


def _size(size: tuple[int, int]) -> str:
    return 'x'.join(map(str, size))
