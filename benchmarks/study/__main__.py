"""``python -m benchmarks.study``: trained comparisons that anyone can repeat."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path

import click

from mmlite.cli import shared
from mmlite.cli.shared import HELP, count_option, flag, option, out_option
from mmlite.openmmlab import require


class _DataFolder(click.ParamType):
    """A data set of the plan and its folder, written bccd=data/bccd."""

    name = 'NAME=FOLDER'

    def convert(self, value, param, ctx) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        name, found, folder = value.partition('=')
        if not (name and found and folder):
            self.fail(f'{value!r} names no folder; write for example bccd=data/bccd')
        return name, Path(folder)


class _Command(click.Command):
    """Turns bad input into one sentence."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error


@click.command(cls=_Command, context_settings=HELP)
@click.argument('plan')
@option(
    '--data',
    'roots',
    type=_DataFolder(),
    multiple=True,
    help='Where a data set of the plan lies; give it more than once for more.',
)
@option('--seed', 'seeds', type=click.IntRange(0), multiple=True, help="Instead of the plan's.")
@count_option('--jobs', default=1, help='Runs at a time, each in a process on a core of its own.')
@option('--gpus', type=click.IntRange(0), default=0, help='GPUs of each run; they run in turn.')
@out_option("Folder of the studies; this one's is in it.", default='work_dirs/study')
@flag('--report', 'only_report', help='Train nothing; report what is there.')
def study(
    plan: str,
    roots: tuple[tuple[str, Path], ...],
    seeds: tuple[int, ...],
    jobs: int,
    gpus: int,
    out: Path,
    only_report: bool,
) -> None:
    """Train every row of a plan with every seed, and compare the rows with the baseline.

    PLAN is a YAML file or one that ships: small or coco. A study that was stopped, in whichever
    way, goes on where it was when the same command is given again. Results, tables and plots are
    in OUT/NAME: report.html, report.md, plots/, runs.csv, summary.csv, and of each run its config
    and result.json.

    \b
    Example:
      python -m benchmarks.study small --data bccd=data/bccd --jobs 2
      python -m benchmarks.study small --report
      python -m benchmarks.study coco --gpus 8
    """
    require()
    from .execute import Study, execute
    from .plan import read_plan
    from .report import write_report

    warnings.filterwarnings('ignore')  # those of the stack about itself bury the progress
    chosen = read_plan(plan, dict(roots), seeds)
    found = Study(chosen, out / chosen.name)
    console = shared.console()
    complete = True
    if not only_report:
        found.check()
        found.folder.mkdir(parents=True, exist_ok=True)

        def on_end(run, result: dict | None, why: str) -> None:
            if result is None:
                text = f'failed: {why}'
            elif not result['finite']:
                text = f'not averaged: {result["problem"]}'
            else:
                value = result['metrics'][chosen.metric]
                text = f'{chosen.metric} {value:.1f}, {result["train_seconds"]:.0f} s of training'
            console.print(f'{run.title}: {text}', soft_wrap=True)
            console.file.flush()

        with shared.progress() as start:
            complete = execute(found, jobs, start, on_end, gpus)
    command = shlex.join(['python', '-m', 'benchmarks.study', *sys.argv[1:]])
    report = write_report(found, command)
    for table in report.tables:
        shared.print_table(table.title, table.columns, table.rows, justify='right')
    for note in report.notes:
        console.print(note, soft_wrap=True)
    console.print(f'Report: {found.folder / "report.html"}', soft_wrap=True)
    if not complete:
        raise click.ClickException('some runs failed, as said above; the same command tries again')


if __name__ == '__main__':
    study(prog_name='python -m benchmarks.study')
