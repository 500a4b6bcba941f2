"""``mmlite check``: finds what is wrong with the data of a config before it is trained on."""

from __future__ import annotations

import os
from collections import defaultdict

import click
from rich.text import Text

from . import shared

SHOWN_PLACES = 3


@click.command()
@shared.config_argument
@shared.count_option('--workers', default=os.cpu_count(), help='Threads that decode images.')
@shared.cfg_options
@shared.json_option
@click.pass_context
def check(ctx: click.Context, config: str, workers: int, cfg_options: dict, json_path) -> None:
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
    cfg = shared.read_config(config, cfg_options)
    from ..datasets.check import COUNTS, PROBLEMS, REMARKS, check_data, check_model
    from ..openmmlab.build import build_detector

    places = defaultdict(list)
    with shared.progress() as start:
        data_sets = check_data(cfg, places, workers, start)
    try:
        check_model(build_detector(cfg), cfg, data_sets, places)
    except ValueError as error:
        places['model', 'model'].append(str(error))

    summaries = [data.as_json() for data in data_sets]
    if summaries:
        keys = ('name', 'images', 'objects', 'most_objects', 'annotation_file')
        columns = ('data', 'images', 'objects', 'at most in one image', 'annotation file')
        rows = [[summary[key] for key in keys] for summary in summaries]
        shared.print_table('Data', columns, rows)
    for summary in summaries:
        rows = [[count[name] for name in COUNTS] for count in summary['classes']]
        columns = ('class', *COUNTS[1:])
        shared.print_table(f'Classes of {summary["name"]}', columns, rows, justify='right')
    found = [
        {'data': data, 'kind': kind, 'places': where, 'problem': kind in PROBLEMS}
        for (data, kind), where in places.items()
        if where
    ]
    found.sort(key=lambda finding: not finding['problem'])
    rows, meanings = [], {**PROBLEMS, **REMARKS}
    for data, kind, where, problem in (finding.values() for finding in found):
        more = [f'and {len(where) - SHOWN_PLACES} more'] if len(where) > SHOWN_PLACES else []
        shown = '\n'.join([*where[:SHOWN_PLACES], *more])
        text = Text.assemble((kind, 'red' if problem else 'yellow'), '\n', meanings[kind])
        rows.append((data, text, len(where), shown))
    if rows:
        columns = ('data', 'finding', 'count', 'where')
        shared.print_table('Findings', columns, rows, show_lines=True)
    problems = sum(finding['problem'] for finding in found)
    report = {'config': config, 'data': summaries, 'findings': found, 'problems': problems}
    shared.write_json(json_path, report)
    if problems:
        click.echo(f'{problems} kinds of problems' if problems > 1 else '1 kind of problem')
        ctx.exit(1)
    unread = ', '.join(finding['data'] for finding in found if finding['kind'] == 'not checked')
    click.echo('No problems found' + (f' in what was checked, without {unread}' if unread else ''))
