"""``mmlite check``: what is wrong with the data of a config, before any training is lost on it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from ..openmmlab import require
from .shared import (
    cfg_options,
    config_argument,
    console,
    count_option,
    json_option,
    print_table,
    progress,
    write_json,
)

if TYPE_CHECKING:
    from ..datasets.check import DataSummary, Finding

SHOWN_PLACES = 3


@click.command()
@config_argument
@count_option('--workers', default=os.cpu_count(), help='Processes that decode images.')
@json_option
@cfg_options
@click.pass_context
def check(
    ctx: click.Context, config: str, workers: int, json_path: Path | None, cfg_options: dict
) -> None:
    """Read every image and annotation of the data sets that CONFIG names, then build its model.

    CONFIG is a path, or the name of a packaged config such as mmdet::dino/x.py. Found are images
    that are missing, broken or cut off, boxes outside of their image, ids that occur twice, classes
    and categories that differ, images with more objects than the detector has queries, and
    whatever of the model does not fit the data.

    Exits with 0 where all is well, remarks aside, and with 1 where there are problems.

    \b
    Example:
      mmlite check my_config.py
      mmlite check my_config.py --workers 8 --json report.json
      mmlite check my_config.py --cfg-options model.num_queries=300
    """
    require()
    from ..datasets.check import Findings, check_data, check_model
    from ..openmmlab.build import build_detector, load_config

    cfg = load_config(config, cfg_options)
    findings = Findings()
    with progress() as start:
        summaries = check_data(cfg, findings, workers, start)
    try:
        model = build_detector(cfg)
    except ValueError as error:
        findings.add('model', 'model', error)
    else:
        check_model(model, cfg, summaries, findings)

    found = findings.sorted()
    problems = sum(finding.is_problem for finding in found)
    _show(summaries, found)
    report = {
        'config': config,
        'data': summaries,
        'findings': [{**asdict(f), 'problem': f.is_problem, 'count': len(f.places)} for f in found],
        'problems': problems,
    }
    write_json(json_path, report)
    if problems:
        click.echo(f'{problems} kinds of problems' if problems > 1 else '1 kind of problem')
        ctx.exit(1)
    unread = ', '.join(f.data for f in found if f.kind == 'not checked')
    click.echo(
        f'No problems found in what was checked, without {unread}'
        if unread
        else 'No problems found'
    )


def _show(summaries: list[DataSummary], found: list[Finding]) -> None:
    data = _table('Data', 'data', 'images', 'objects', 'at most in one image', 'annotation file')
    for summary in summaries:
        numbers = (summary.images, summary.objects, summary.most_objects)
        data.add_row(summary.name, *map(str, numbers), escape(summary.annotation_file))
    if summaries:
        console().print(data)
    for summary in summaries:
        print_table(
            f'Classes of {summary.name}',
            ['class', 'images', 'objects', 'small', 'medium', 'large'],
            [
                [escape(c.name), *map(str, (c.images, c.objects, c.small, c.medium, c.large))]
                for c in summary.classes
            ],
            justify='right',
        )
    findings = _table('Findings', 'data', 'finding', 'count', 'where', show_lines=True)
    for finding in found:
        places = finding.places[:SHOWN_PLACES]
        if len(finding.places) > SHOWN_PLACES:
            places.append(f'and {len(finding.places) - SHOWN_PLACES} more')
        color = 'red' if finding.is_problem else 'yellow'
        findings.add_row(
            finding.data,
            f'[{color}]{finding.kind}[/]\n{finding.meaning}',
            str(len(finding.places)),
            escape('\n'.join(places)),
        )
    if found:
        console().print(findings)


def _table(title: str, *columns: str, **options: bool) -> Table:
    """A table whose last column shows long paths whole."""
    table = Table(*columns[:-1], title=title, title_justify='left', **options)
    table.add_column(columns[-1], overflow='fold')
    return table
