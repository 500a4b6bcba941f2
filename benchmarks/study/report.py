"""What a study found: tables, plots, files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mmlite.analysis.accuracy import METRICS
from mmlite.analysis.published import PRESETS, Published, preset
from mmlite.analysis.report import BASELINE, COLORS, Report, Table, plot, scatter

from .execute import Study, unfinished
from .plan import Data, Run, slug
from .statistics import Sample, by_metric, paired, sample

_PUBLISHED = {
    'AP': 'ap',
    'AP50': 'ap50',
    'AP75': 'ap75',
    'APs': 'ap_small',
    'APm': 'ap_medium',
    'APl': 'ap_large',
}
# What else of a result is averaged: head -> key, digits.
_COSTS = {
    'encoder GFLOPs': ('encoder_gflops', 3),
    'params M': ('params', 2),
    'training ms': ('train_ms', 0),
    'inference ms': ('inference_ms', 1),
}
# Row -> seed -> result of a run with a finite loss.
Results = Mapping[str, Mapping[int, dict]]


def write_report(study: Study, command: str) -> Report:
    """Write what the finished runs say into the study's folder.

    Returns:
        Report: What is in ``report.md`` and ``report.html``; ``runs.csv`` and ``summary.csv`` hold
        the same figures, ``plots/`` the plots as SVG.

    Raises:
        ValueError: Nothing has been finished yet, or a run was made with another config.
        OSError: The folder cannot be written.
    """
    results = study.results()
    if not results:
        raise ValueError(
            f'no run of {study.plan.path} has been finished in {study.folder}; run the study first'
        )
    report = make_report(study, results)
    report.command = command
    plots = _write_plots(study.folder, report.page['figures'])
    (study.folder / 'report.md').write_text('\n\n'.join([report.markdown(), *plots]) + '\n')
    (study.folder / 'report.html').write_text(report.html())
    _write_csv(study.folder / 'runs.csv', [_line(run, results[run]) for run in results])
    _write_csv(study.folder / 'summary.csv', _summary(study, results))
    return report


def make_report(study: Study, results: Mapping[Run, dict]) -> Report:
    """The report of the runs that have been finished."""
    plan = study.plan
    tables, figures, headline = [], [], []
    for data in plan.data.values():
        found = _of_data(study, results, data)
        if not found:
            continue
        tables += _tables(study, data, found)
        figures += _figures(study, data, found)
        headline += _headline(study, data, found)
    published = _published_table(study, results)
    if published:
        tables.append(published)
    seconds = sum(result['train_seconds'] for result in results.values())
    state = f'{len(results)} of {len(plan.runs)} runs finished, {seconds / 3600:.2f} h of training'
    notes = [f'{state}. Metrics are in percent, FLOPs count one multiply-add as one.']
    bad = [f'{r.title} ({x["problem"]})' for r, x in results.items() if not x['finite']]
    if bad:
        notes.append(f'Not averaged, because of their loss: {"; ".join(bad)}.')
    begun = unfinished(study)
    if begun:
        text = '; '.join(f'{title} (epoch {epoch})' for title, epoch in begun.items())
        notes.append(f'Begun and not finished: {text}.')
    if published:
        notes.append("Published figures are the paper's; none of them was measured here.")
    machines = [result['machine'] for result in results.values()]
    return Report(
        settings={'plan': str(plan.path), 'seeds': list(plan.seeds), 'metric': plan.metric},
        results=list(results.values()),
        tables=tables,
        notes=notes,
        page={'title': plan.title, 'state': state, 'headline': headline, 'figures': figures},
        template=Path(__file__).with_name('report.html.jinja'),
        machine={
            name: ' or '.join(dict.fromkeys(str(m.get(name)) for m in machines))
            for name in machines[0]
        },
    )


def _of_data(study: Study, results: Mapping[Run, dict], data: Data) -> Results:
    found: dict[str, dict[int, dict]] = {}
    for name in study.plan.rows:
        of_row = {
            run.seed: result
            for run, result in results.items()
            if run.data is data and run.row.name == name and result['finite']
        }
        if of_row:
            found[name] = of_row
    return found


def _tables(study: Study, data: Data, found: Results) -> list[Table]:
    names = list(METRICS)
    rows = list(found.items())
    first = {'row': lambda item: item[0], 'seeds': lambda item: len(item[1])}

    def metric(name: str) -> Callable[[Any], str]:
        return lambda item: sample(by_metric(item[1], names)[name]).with_spread()

    means = Table.of(
        f'{data.title}: mean and spread over seeds',
        rows,
        {
            **first,
            **{name: metric(name) for name in names},
            **{
                head: lambda item, key=key, digits=digits: f'{_mean(item[1], key):.{digits}f}'
                for head, (key, digits) in _COSTS.items()
            },
        },
    )
    base = found.get(study.plan.baseline)
    if base is None or len(found) < 2:
        return [means]
    against = by_metric(base, names)

    def difference(name: str) -> Callable[[Any], str]:
        return lambda item: paired(by_metric(item[1], names)[name], against[name]).with_interval()

    key = study.plan.metric
    differences = Table.of(
        f'{data.title}: differences from {study.plan.baseline} by seed, with the 95 % interval',
        [(row, result) for row, result in rows if row != study.plan.baseline],
        {
            'row': lambda item: item[0],
            'pairs': lambda item: len(set(item[1]) & set(base)),
            **{name: difference(name) for name in names},
            f'% of {key}': lambda item: paired(
                by_metric(item[1], names)[key], against[key], ratio=True
            ).with_interval(sign=''),
        },
    )
    return [means, differences]


def _mean(results: Mapping[int, dict], key: str) -> float:
    scale = 1e-6 if key == 'params' else 1.0
    return scale * Sample(tuple(result[key] for result in results.values())).mean


def _headline(study: Study, data: Data, found: Results) -> list[dict]:
    plan, cards = study.plan, []
    base = found.get(plan.baseline)
    for name, results in found.items() if base else ():
        if name == plan.baseline:
            continue
        values, against = (by_metric(r, [plan.metric])[plan.metric] for r in (results, base))
        share = paired(values, against, ratio=True)
        if not share.values:
            continue
        saved = 1 - _mean(results, 'encoder_gflops') / _mean(base, 'encoder_gflops')
        facts = [
            (f'{share.mean:.1f} %', f"of {plan.baseline}'s {plan.metric}"),
            (f'{saved:.0%}', 'fewer encoder FLOPs'),
        ]
        cards.append({'name': name, 'where': data.title, 'facts': facts})
    return cards


def _figures(study: Study, data: Data, found: Results) -> list[tuple[str, str]]:
    plan = study.plan
    costs = {
        'encoder GFLOPs': 'encoder_gflops',
        'training ms an iteration': 'train_ms',
        'inference ms an image': 'inference_ms',
    }
    figures = [
        (
            f'{data.name}: {plan.metric} against {label}',
            plot(_against, found, plan.metric, plan.baseline, key, label),
        )
        for label, key in costs.items()
    ]
    curves = plot(_curves, found, plan.metric, plan.baseline)
    return [*figures, (f'{data.name}: learning curves, mean over seeds', curves)]


def _against(axes: Axes, found: Results, metric: str, baseline: str, key: str, label: str) -> None:
    points = []
    for name, results in found.items():
        values = sample(by_metric(results, [metric])[metric])
        if not values.values:
            continue
        style = _style(list(found).index(name), name == baseline)
        x, y = _mean(results, key), values.mean
        if len(values.values) > 1:
            axes.errorbar(x, y, values.spread, color=style['color'], lw=0.8, capsize=2)
        points.append((name, x, y, {'marker': 's' if name == baseline else 'o', **style}))
    scatter(axes, points, label, metric)


def _curves(axes: Axes, found: Results, metric: str, baseline: str) -> None:
    for index, (name, results) in enumerate(found.items()):
        points: dict[int, list[float]] = {}
        for result in results.values():
            for point in result['curve']:
                if point[metric] is not None:
                    points.setdefault(point['iteration'], []).append(point[metric])
        x = sorted(points)
        y = [sum(points[i]) / len(points[i]) for i in x]
        dashes = '--' if index >= len(COLORS) else '-'
        axes.plot(x, y, dashes, marker='.', label=name, **_style(index, name == baseline))
    axes.set_xlabel('iterations')
    axes.set_ylabel(metric)
    axes.legend(fontsize=7, frameon=False)


def _style(index: int, is_baseline: bool) -> dict:
    return {'color': BASELINE if is_baseline else COLORS[index % len(COLORS)]}


def _published_of(reference: str | None) -> Published | None:
    rows = (row for name in PRESETS for group in preset(name) for row in group)
    return next((row for row in rows if row.config == reference), None)


def _published_table(study: Study, results: Mapping[Run, dict]) -> Table | None:
    """Rows whose config is that of a published one, both figures side by side."""
    lines = []
    for data in study.plan.data.values():
        for name, of_row in _of_data(study, results, data).items():
            run = next(r for r in results if r.data is data and r.row.name == name)
            published = _published_of(study.plan.config_reference(run))
            if published is not None:
                lines.append((name, of_row, published))
    if not lines:
        return None

    def cell(name: str, key: str) -> Callable[[Any], str]:
        def both(item: Any) -> str:
            measured = sample(by_metric(item[1], [name])[name]).with_spread()
            return f'{measured} / {getattr(item[2], key):.1f}'

        return both

    columns = {name: cell(name, key) for name, key in _PUBLISHED.items()}
    return Table.of('Measured here / published', lines, {'row': lambda item: item[0], **columns})


def _line(run: Run, result: dict) -> dict:
    keys = ('finite', *(key for key, _ in _COSTS.values()), 'gflops', 'iterations', 'train_seconds')
    return {
        'data': run.data.name,
        'row': run.row.name,
        'seed': run.seed,
        **result['metrics'],
        **{key: result[key] for key in keys},
    }


def _summary(study: Study, results: Mapping[Run, dict]) -> list[dict]:
    lines = []
    for data in study.plan.data.values():
        found = _of_data(study, results, data)
        base = found.get(study.plan.baseline)
        for name, of_row in found.items():
            for metric in METRICS:
                values = by_metric(of_row, [metric])[metric]
                own = sample(values)
                if not own.values:
                    continue
                line = {
                    'data': data.name,
                    'row': name,
                    'metric': metric,
                    'seeds': len(own.values),
                    'mean': round(own.mean, 3),
                    'spread': round(own.spread, 3),
                }
                if base and name != study.plan.baseline:
                    pairs = paired(values, by_metric(base, [metric])[metric])
                    if pairs.values:
                        low, high = pairs.interval
                        line.update(
                            difference=round(pairs.mean, 3), low=round(low, 3), high=round(high, 3)
                        )
                lines.append(line)
    return lines


def _write_plots(folder: Path, figures: Sequence[tuple[str, str]]) -> list[str]:
    """Write them to files and return the lines of Markdown that show those."""
    (folder / 'plots').mkdir(exist_ok=True)
    lines = []
    for title, svg in figures:
        path = folder / 'plots' / f'{slug(title)}.svg'
        # A file may be shown on a page of any colour.
        path.write_text(svg.replace('<svg', '<svg style="background: white"', 1))
        lines.append(f'![{title}]({path.relative_to(folder).as_posix()})')
    return lines


def _write_csv(path: Path, lines: Sequence[dict]) -> None:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
