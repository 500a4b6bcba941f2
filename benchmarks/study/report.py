"""What a study found: tables, plots, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from mmlite.analysis.accuracy import METRICS
from mmlite.analysis.published import PRESETS, preset
from mmlite.analysis.report import Report, Table

from .execute import Study, unfinished
from .plan import Data, Run, slug
from .plots import BASELINE, COLORS, plot, scatter
from .statistics import difference, equivalence, interval, share, with_interval, with_spread

_PUBLISHED = {
    'AP': 'ap',
    'AP50': 'ap50',
    'AP75': 'ap75',
    'APs': 'ap_small',
    'APm': 'ap_medium',
    'APl': 'ap_large',
}
_HOW = (
    'Every run is trained from the same config but for what its row names, with the same seeds, '
    'and evaluated by pycocotools after its last epoch; no best epoch is chosen. Spread is the '
    'standard deviation over seeds. Differences are taken seed by seed, with the 95 % interval of '
    "Student's t over the seeds. Times are CPU seconds of the process (on a GPU: of the wall) "
    'while it trained and evaluated.'
)
# What else of a result is averaged: head -> key, digits.
_COSTS = {
    'encoder GFLOPs': ('encoder_gflops', 3),
    'params M': ('params', 2),
    'training ms': ('train_ms', 0),
    'inference ms': ('inference_ms', 1),
}
# Row -> a frame of its runs with a finite loss: a line for each seed.
Found = Mapping[str, pd.DataFrame]


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
    frame(results).to_csv(study.folder / 'runs.csv', index=False)
    _summary(study, results).to_csv(study.folder / 'summary.csv', index=False)
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
        figures += _figures(study, data, found, results)
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
        page={
            **{'title': plan.title, 'intro': state, 'headline': headline},
            **{'figures': figures, 'how': _HOW},
        },
        machine={
            name: ' or '.join(dict.fromkeys(str(m.get(name)) for m in machines))
            for name in machines[0]
        },
    )


def frame(results: Mapping[Run, dict]) -> pd.DataFrame:
    """A line for each finished run: what it is, its metrics and what it cost."""
    keys = ('finite', *(key for key, _ in _COSTS.values()), 'gflops', 'iterations', 'train_seconds')
    lines = pd.DataFrame(
        {
            **{'data': run.data.name, 'row': run.row.name, 'seed': run.seed},
            **result['metrics'],
            **{key: result[key] for key in keys},
        }
        for run, result in results.items()
    )
    return lines.astype(dict.fromkeys(METRICS, float))  # None, where COCO had no such objects


def _of_data(study: Study, results: Mapping[Run, dict], data: Data) -> Found:
    runs = frame(results).query('finite and data == @data.name').set_index('seed')
    found = dict(iter(runs.groupby('row')))
    return {name: found[name] for name in study.plan.rows if name in found}


def _tables(study: Study, data: Data, found: Found) -> list[Table]:
    plan = study.plan
    rows = [
        (
            *(name, len(runs), *(with_spread(runs[metric].dropna()) for metric in METRICS)),
            *(f'{_mean(runs, key):.{digits}f}' for key, digits in _COSTS.values()),
        )
        for name, runs in found.items()
    ]
    title = f'{data.title}: mean and spread over seeds'
    means = _table(title, ('row', 'seeds', *METRICS, *_COSTS), rows)
    base = found.get(plan.baseline)
    if base is None or len(found) < 2:
        return [means]
    heads = ['row', 'pairs', *METRICS, f'% of {plan.metric}']
    heads += [f'p of equivalence within {plan.margin:g} %'] if plan.margin else []
    rows = []
    for name, runs in found.items():
        if name == plan.baseline:
            continue
        differences = (difference(runs[metric], base[metric]) for metric in METRICS)
        shares = share(runs[plan.metric], base[plan.metric])
        row = [name, len(shares), *map(with_interval, differences), with_interval(shares, sign='')]
        rows.append(row + ([f'{equivalence(shares, plan.margin):.3f}'] if plan.margin else []))
    title = f'{data.title}: differences from {plan.baseline} by seed, with the 95 % interval'
    return [means, _table(title, heads, rows)]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence]) -> Table:
    return Table(title, [dict(zip(heads, row)) for row in rows])


def _mean(runs: pd.DataFrame, key: str) -> float:
    return (1e-6 if key == 'params' else 1.0) * runs[key].mean()


def _headline(study: Study, data: Data, found: Found) -> list[dict]:
    plan, cards = study.plan, []
    base = found.get(plan.baseline)
    for name, runs in found.items() if base is not None else ():
        shares = share(runs[plan.metric], base[plan.metric])
        if name == plan.baseline or shares.empty:
            continue
        saved = 1 - _mean(runs, 'encoder_gflops') / _mean(base, 'encoder_gflops')
        facts = [
            (f'{shares.mean():.1f} %', f"of {plan.baseline}'s {plan.metric}"),
            (f'{saved:.0%}', 'fewer encoder FLOPs'),
        ]
        cards.append({'name': name, 'where': data.title, 'facts': facts})
    return cards


def _figures(
    study: Study, data: Data, found: Found, results: Mapping[Run, dict]
) -> list[tuple[str, str]]:
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
    points = (
        (run.row.name, point['iteration'], point[plan.metric])
        for run, result in results.items()
        if run.data is data and result['finite']
        for point in result['curve']
    )
    curves = pd.DataFrame(points, columns=['row', 'iteration', plan.metric]).dropna()
    means = curves.groupby(['row', 'iteration'])[plan.metric].mean().astype(float)
    curves = plot(_curves, means, list(found), plan.metric, plan.baseline)
    return [*figures, (f'{data.name}: learning curves, mean over seeds', curves)]


def _against(axes: Axes, found: Found, metric: str, baseline: str, key: str, label: str) -> None:
    points = []
    for index, (name, runs) in enumerate(found.items()):
        values = runs[metric].dropna()
        if values.empty:
            continue
        style = _style(index, name == baseline)
        x, y = _mean(runs, key), values.mean()
        if len(values) > 1:
            axes.errorbar(x, y, values.std(), color=style['color'], lw=0.8, capsize=2)
        points.append((name, x, y, {'marker': 's' if name == baseline else 'o', **style}))
    scatter(axes, points, label, metric)


def _curves(axes: Axes, means: pd.Series, names: list[str], metric: str, baseline: str) -> None:
    for index, name in enumerate(names):
        curve = means[means.index.get_level_values('row') == name].droplevel('row')
        dashes = '--' if index >= len(COLORS) else '-'
        style = _style(index, name == baseline)
        axes.plot(curve.index, curve, dashes, marker='.', label=name, **style)
    axes.set_xlabel('iterations')
    axes.set_ylabel(metric)
    axes.legend(fontsize=7, frameon=False)


def _style(index: int, is_baseline: bool) -> dict:
    return {'color': BASELINE if is_baseline else COLORS[index % len(COLORS)]}


def _published_table(study: Study, results: Mapping[Run, dict]) -> Table | None:
    """Rows whose config is that of a published one, both figures side by side."""
    published = {row.config: row for name in PRESETS for group in preset(name) for row in group}
    rows = []
    for data in study.plan.data.values():
        for name, runs in _of_data(study, results, data).items():
            run = next(run for run in results if run.data is data and run.row.name == name)
            paper = published.get(study.plan.config_reference(run))
            if paper is not None:
                cells = (
                    f'{with_spread(runs[metric].dropna())} / {getattr(paper, key):.1f}'
                    for metric, key in _PUBLISHED.items()
                )
                rows.append((name, *cells))
    return _table('Measured here / published', ('row', *_PUBLISHED), rows) if rows else None


def _summary(study: Study, results: Mapping[Run, dict]) -> pd.DataFrame:
    lines = []
    for data in study.plan.data.values():
        found = _of_data(study, results, data)
        base = found.get(study.plan.baseline)
        for name, runs in found.items():
            for metric in METRICS:
                own = runs[metric].dropna()
                if own.empty:
                    continue
                line = {'data': data.name, 'row': name, 'metric': metric, 'seeds': len(own)}
                line |= {'mean': own.mean(), 'spread': own.std()}
                if base is not None and name != study.plan.baseline:
                    pairs = difference(runs[metric], base[metric])
                    if not pairs.empty:
                        low, high = interval(pairs)
                        line |= {'difference': pairs.mean(), 'low': low, 'high': high}
                lines.append(line)
    return pd.DataFrame(lines).round(3)


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
