"""``mmlite check``: finds what is wrong with the data of a config before it is trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from .shared import (
    cfg_options,
    config_argument,
    count_option,
    json_option,
    print_table,
    progress,
    read_config,
    write_json,
)

if TYPE_CHECKING:
    from ..datasets.check import DataSummary

SHOWN_PLACES = 3


@click.command()
@config_argument
@count_option('--workers', default=os.cpu_count(), help='Processes that decode images.')
@cfg_options
@json_option
@click.pass_context
def check(
    ctx: click.Context, config: str, workers: int, cfg_options: dict, json_path: Path | None
) -> None:
    """Read every image and annotation that CONFIG names, then build its model.

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
    cfg = read_config(config, cfg_options)
    from ..datasets.check import PROBLEMS, Findings, check_data, check_model
    from ..openmmlab.build import build_detector

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
    problems = sum(kind in PROBLEMS for _, kind in findings)
    _show(summaries, found)
    report = {
        'config': config,
        'data': summaries,
        'findings': [
            {
                'data': data,
                'kind': kind,
                'places': places,
                'problem': kind in PROBLEMS,
                'count': len(places),
            }
            for (data, kind), places in found
        ],
        'problems': problems,
    }
    write_json(json_path, report)
    if problems:
        click.echo(f'{problems} kinds of problems' if problems > 1 else '1 kind of problem')
        ctx.exit(1)
    unread = ', '.join(data for data, kind in findings if kind == 'not checked')
    click.echo(
        f'No problems found in what was checked, without {unread}'
        if unread
        else 'No problems found'
    )


def _show(summaries: list[DataSummary], found: list) -> None:
    if summaries:
        columns = ('data', 'images', 'objects', 'at most in one image', 'annotation file')
        rows = [
            (
                s['name'],
                *(str(s[key]) for key in ('images', 'objects', 'most_objects')),
                escape(s['annotation_file']),
            )
            for s in (summary.as_json() for summary in summaries)
        ]
        print_table('Data', columns, rows)
    for summary in summaries:
        columns = ('class', 'images', 'objects', 'small', 'medium', 'large')
        rows = [
            (escape(count['name']), *(str(count[name]) for name in columns[1:]))
            for count in summary.classes
        ]
        print_table(f'Classes of {summary.name}', columns, rows, justify='right')
    if found:
        columns = ('data', 'finding', 'count', 'where')
        print_table('Findings', columns, map(_finding, found), show_lines=True)


def _finding(finding: tuple[tuple[str, str], list[str]]) -> tuple[str, ...]:
    from ..datasets.check import PROBLEMS, REMARKS

    (data, kind), places = finding
    shown = places[:SHOWN_PLACES]
    if len(places) > SHOWN_PLACES:
        shown.append(f'and {len(places) - SHOWN_PLACES} more')
    color = 'red' if kind in PROBLEMS else 'yellow'
    meaning = {**PROBLEMS, **REMARKS}[kind]
    text = f'[{color}]{kind}[/]\n{meaning}'
    return data, text, str(len(places)), escape('\n'.join(shown))
