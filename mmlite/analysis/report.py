"""Results as people and programs read them: tables, a page, JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from .timing import Contestant, Setting, Timing


@dataclass
class Table:
    """A table, whose first column names the row."""

    title: str
    cells: Sequence[Mapping[str, object]]  # of each row: head of the column -> cell

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(head for row in self.cells for head in row))

    @property
    def rows(self) -> list[list[str]]:
        """The cells as texts; a dash where a row has none."""
        return [[str(row.get(head, '-')) for head in self.columns] for row in self.cells]


@dataclass
class Report:
    """What a benchmark found."""

    settings: dict  # what was run, for programs
    results: Sequence  # every measurement, for programs: dictionaries or dataclasses
    tables: list[Table]  # the same for people
    notes: list[str] = field(default_factory=list)  # sentences for below the tables
    # What the page shows beside the tables: title, intro, how it was measured, headline (cards),
    # bars, figures (caption and SVG).
    page: dict | None = None
    machine: dict[str, str] = field(default_factory=dict)  # what it ran on
    command: str = ''  # what repeats it

    @property
    def machine_line(self) -> str:
        return ', '.join(f'{name}: {text}' for name, text in self.machine.items())

    def as_json(self) -> dict:
        head = {'machine': self.machine, 'settings': self.settings, 'command': self.command}
        return {**head, 'results': self.results}

    def markdown(self) -> str:
        """The tables and notes in GitHub's Markdown."""
        parts = [f'{self.machine_line}\n']
        for table in self.tables:
            rules = ['---', *['---:'] * (len(table.columns) - 1)]
            lines = [' | '.join(line) for line in (table.columns, rules, *table.rows)]
            parts += [f'**{table.title}**\n', *(f'| {line} |' for line in lines), '']
        return '\n'.join([*parts, *self.notes]) + '\n'

    def html(self) -> str:
        """A page that stands alone: no network, no scripts, readable on a phone."""
        return render(report=self, **self.page)


def render(picture: Path | None = None, **content: object) -> str:
    """Fill in ``templates/page.html``; ``picture`` is the file of a PNG."""
    import jinja2

    loader = jinja2.PackageLoader('mmlite.analysis', 'templates')
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    encoded = picture and base64.b64encode(picture.read_bytes()).decode()
    return pages.get_template('page.html').render(content, picture=encoded)


def time_tables(contestants: Sequence[Contestant], setting: Setting, where: str) -> list[Table]:
    """A table for each part and batch size: time, how many times faster, memory of a GPU."""
    found = []
    for part, batch_size in product(setting.parts, setting.batch_sizes):
        timed = [(each, each.timings.get(part, {}).get(batch_size)) for each in contestants]
        rows = [{**each.label(), **_cells(timing)} for each, timing in timed if timing]
        title = f'{part.capitalize()}, {setting.describe(batch_size)}, {where}'
        found += [Table(title, rows)] if rows else []
    return found


def _cells(timing: Timing) -> dict[str, object]:
    times = {f'{n} ms': milliseconds(getattr(timing, n)) for n in ('median', 'mean', 'p95')}
    memory = {} if timing.memory is None else {'peak MiB': f'{timing.memory / 2**20:.1f}'}
    return {**times, **timing.faster, **memory}


def milliseconds(seconds: float) -> str:
    """Three significant digits, in ms."""
    value = 1000 * seconds
    return f'{value:.0f}' if value >= 100 else f'{value:#.3g}'


def giga(count: float) -> str:
    """In units of 10^9."""
    return f'{count / 1e9:.1f}'


def size(height_width: Sequence[int]) -> str:
    """``800x1333``."""
    return 'x'.join(map(str, height_width))
