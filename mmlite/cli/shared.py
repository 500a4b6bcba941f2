"""What the subcommands share: options, progress bars, tables, files."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mmengine.config import Config

    from ..analysis.report import Report

PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
HELP = {'help_option_names': ['-h', '--help']}

option = partial(click.option, show_default=True)
count_option = partial(option, type=click.IntRange(1))
file_option = partial(option, type=FILE)
flag = partial(click.option, is_flag=True)


def _use_threads(ctx: click.Context, parameter: click.Parameter, count: int | None) -> None:
    if count:
        import torch

        from ..export.runtimes import check_threads

        check_threads(count)
        torch.set_num_threads(count)


def _check_device(ctx: click.Context, parameter: click.Parameter, device: str) -> str:
    """Refuse a device that is not there before any work is done."""
    if device == 'cpu':  # exports run there without torch
        return device
    import torch

    from ..export.runtimes import check_device

    check_device(device)
    if torch.device(device).type == 'cuda':
        torch.cuda.set_device(device)  # events and Triton's launches belong to the current one
    return device


# One thing has one spelling in every command.
config_argument = click.argument('config')
threads_option = count_option(
    '--threads', callback=_use_threads, expose_value=False, help='CPU threads. Default: all cores.'
)
device_option = option(
    '--device', default='cpu', callback=_check_device, help='cpu, cuda or cuda:1.'
)
json_option = file_option('--json', 'json_path', help='Write the results here, too.')
images_option = partial(
    *(option, '--images', 'files'),
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    callback=lambda ctx, parameter, paths: image_files(paths) if paths else [],
)
image_size_option = partial(
    option, '--image-size', nargs=2, type=click.IntRange(1), metavar='H W', default=(800, 1333)
)


def dataset_options(help: str, images: str = '--annotated-images') -> Callable:
    """``--annotations`` and the folder of their images, as ``dataset``: checked, or None."""

    def add(command: Callable) -> Callable:
        @file_option('--annotations', help=help)
        @option(images, 'folder', type=FOLDER, help='Folder of their images.')
        @wraps(command)
        def run(annotations: Path | None, folder: Path | None, **values: Any) -> Any:
            if (annotations is None) != (folder is None):
                raise ValueError(f'--annotations and {images} go together')
            if annotations is None:
                return command(dataset=None, **values)
            from ..analysis.accuracy import Dataset

            return command(dataset=Dataset(annotations, folder), **values)

        return run

    return add


def out_option(help: str, ending: str | None = None, **options) -> Callable:
    """``-o/--out``: a folder, or a file that gets ``ending`` where its name has none.

    A place that cannot be written is refused before any work.
    """

    def checked(ctx: click.Context, parameter: click.Parameter, path: Path | None):
        if path:
            path = path.with_suffix(ending) if ending and not path.suffix else path
            wanted = path.absolute()
            there = next(each for each in (wanted, *wanted.parents) if each.exists())
            if not (os.access(there, os.W_OK) and (there == wanted or there.is_dir())):
                raise click.BadParameter(f'{there} cannot be written; choose another with --out')
        return path

    kind = FILE if ending else FOLDER
    return option('-o', '--out', type=kind, help=help, callback=checked, **options)


def _parse_changes(ctx: click.Context, parameter: click.Parameter, changes: tuple[str, ...]):
    for change in changes:
        if '=' not in change:
            raise click.BadParameter(f'{change!r} is no change of a config; write KEY=VALUE')
    if not changes:
        return {}
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser()
    parser.add_argument('changes', nargs='+', action=DictAction)
    return parser.parse_args(['--', *changes]).changes


cfg_options = click.option(
    '--cfg-options',
    multiple=True,
    metavar='KEY=VALUE...',
    callback=_parse_changes,
    help='Change the config, for example model.test_cfg.max_per_img=100.',
)


def spread(arguments: Sequence[str]) -> list[str]:
    """Rewrite arguments as click takes them.

    Several changes may follow one ``--cfg-options``, as in MMDetection's tools. Version 0.1.0 had
    ``--image-size 800x1333`` and ``--image``.
    """
    result: list[str] = []
    for argument in arguments:
        argument = re.sub('^--image(?=$|=)', '--images', argument)
        if argument.startswith('--image-size='):
            result.append('--image-size')
            argument = argument.partition('=')[2]
        if result[-2:-1] == ['--cfg-options'] and re.match(r'[^-][^=]*=', argument):
            result.append('--cfg-options')
        is_size = result[-1:] == ['--image-size'] and re.fullmatch(r'\d+x\d+', argument)
        result += argument.split('x') if is_size else [argument]
    return result


def read_config(reference: str | Path, changes: dict | None = None) -> Config:
    """A config with the changes of ``--cfg-options``, once MMDetection is known to be there."""
    from ..openmmlab import require

    require()
    from ..openmmlab.build import load_config

    return load_config(str(reference), changes)


# What a folder of images is searched for.
_IMAGE_KINDS = {'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'}


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths``, and the images in the folders among them, in order."""
    files: list[Path] = []
    for path in paths:
        found = path.iterdir() if path.is_dir() else [path]
        files += sorted(f for f in found if f == path or f.suffix.lower() in _IMAGE_KINDS)
    if not files:
        raise ValueError(f'there are no images in {", ".join(map(str, paths))}')
    return files


@contextmanager
def progress() -> Iterator[Callable[[str, int | None], Callable[..., None]]]:
    """A progress bar on stderr: for a text and a number of steps, what to call after each."""
    columns = (*Progress.get_default_columns(), TextColumn('{task.fields[note]}'))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def start(text: str, total: int | None) -> Callable[..., None]:
            task = bar.add_task(text, total=total, note='')
            return lambda note='': bar.update(task, advance=1, note=note)

        yield start


def console() -> Console:
    """Stdout, as wide as tables are where it is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 500, highlight=False)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence],
    justify: str = 'left',
    **style: bool,
) -> None:
    """Print a table; ``justify`` says where the cells of all columns but the first stand."""
    shown = Table(title=title, title_justify='left', **style)
    shown.add_column(columns[0], no_wrap=True, overflow='fold')
    for column in columns[1:]:
        shown.add_column(column, justify=justify, overflow='fold')
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    console().print(shown)


def show(
    report: Report,
    json_path: Path | None = None,
    html_path: Path | None = None,
    markdown_path: Path | None = None,
) -> None:
    """Print a report, in Markdown where it goes to a file; write the files wanted."""
    if sys.stdout.isatty():
        click.echo(report.machine_line)
        for table in report.tables:
            print_table(table.title, table.columns, table.rows, justify='right')
        click.echo('\n'.join(report.notes))
    else:
        click.echo(report.markdown(), nl=False)
    write_json(json_path, report.as_json())
    if markdown_path:
        markdown_path.write_text(report.markdown())
    if html_path:
        html_path.write_text(report.html())


def write_json(path: Path | None, content: dict) -> None:
    """Write a report for programs, where one is wanted; dataclasses become dictionaries."""
    if path:
        path.write_text(json.dumps(content, indent=2, default=_plain) + '\n')


def _plain(value: Any) -> dict:
    return value.as_json() if hasattr(value, 'as_json') else asdict(value)
