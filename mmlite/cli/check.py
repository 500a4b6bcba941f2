"""``mmlite check``: what is wrong with the data of a config, before any training is lost on it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..integrations import require

if TYPE_CHECKING:
    from ..datasets.check import DataSummary, Finding

SHOWN_PLACES = 3


@click.command()
@click.argument('config')
@click.option(
    '--workers',
    type=click.IntRange(1),
    default=os.cpu_count(),
    help='Processes that decode images. Default: as many as there are cores.',
)
@click.option(
    '--json',
    'json_path',
    type=click.Path(dir_okay=False, path_type=Path),
    help='Write the report here, with every place of every finding.',
)
@click.pass_context
def check(ctx: click.Context, config: str, workers: int, json_path: Path | None) -> None:
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
    """
    require()
    from ..analysis.models import build_detector, load_config
    from ..datasets.check import Findings, check_data, check_model

    console = Console()
    cfg = load_config(config)
    findings = Findings()
    with Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task('Reading annotations', total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, description='Decoding images', completed=done, total=total)

        summaries = check_data(cfg, findings, workers, advance)
    try:
        with console.status('Building the model'):
            model = build_detector(cfg)
    except ValueError as error:
        findings.add('model', 'model', error)
    else:
        check_model(model, cfg, summaries, findings)

    found = findings.sorted()
    problems = sum(finding.is_problem for finding in found)
    _show(console, summaries, found)
    if json_path:
        report = {
            'config': config,
            'data': [asdict(summary) for summary in summaries],
            'findings': [
                {**asdict(f), 'problem': f.is_problem, 'count': len(f.places)} for f in found
            ],
            'problems': problems,
        }
        json_path.write_text(json.dumps(report, indent=2) + '\n')
    if problems:
        console.print(f'{problems} kinds of problems' if problems > 1 else '1 kind of problem')
        ctx.exit(1)
    console.print('No problems found')


def _show(console: Console, summaries: list[DataSummary], found: list[Finding]) -> None:
    if summaries:
        data = Table('data', 'images', 'objects', 'at most in one image')
        data.add_column('annotation file', overflow='fold')
        for summary in summaries:
            numbers = (summary.images, summary.objects, summary.most_objects)
            data.add_row(summary.name, *map(str, numbers), escape(summary.annotation_file))
        console.print(data)
    for summary in summaries:
        columns = ('class', 'images', 'objects', 'small', 'medium', 'large')
        classes = Table(*columns, title=f'Classes of {summary.name}')
        for count in summary.classes:
            name, *numbers = (getattr(count, c if c != 'class' else 'name') for c in columns)
            classes.add_row(escape(name), *map(str, numbers))
        console.print(classes)
    if found:
        findings = Table('data', 'finding', 'count', title='Findings', show_lines=True)
        findings.add_column('where', overflow='fold')
        for finding in found:
            places = [escape(place) for place in finding.places[:SHOWN_PLACES]]
            if len(finding.places) > SHOWN_PLACES:
                places.append(f'and {len(finding.places) - SHOWN_PLACES} more')
            findings.add_row(
                finding.data,
                f'[{"red" if finding.is_problem else "yellow"}]{finding.kind}[/]\n'
                f'[dim]{finding.meaning}[/]',
                str(len(finding.places)),
                '\n'.join(places),
            )
        console.print(findings)
