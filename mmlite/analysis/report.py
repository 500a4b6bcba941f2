"""Results as people and programs read them: tables, pages, and the report of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jinja2

from .latency import Timing

# Given a text and a number of steps, returns what to call after each step.
Start = Callable[[str, int], Callable[[], None]]
Columns = Mapping[str, Callable[[Any], object]]


@dataclass
class Table:
    """A table of texts, whose first column names the row."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    @classmethod
    def of(cls, title: str, items: Iterable, columns: Columns) -> Table:
        """A row for each item; each column has a head and a function that gives an item's cell."""
        rows = [[str(cell(item)) for cell in columns.values()] for item in items]
        return cls(title, list(columns), rows)

    def markdown(self) -> str:
        """The table in GitHub's Markdown, its title as a bold line above."""
        lines = [self.columns, ['---', *['---:'] * (len(self.columns) - 1)], *self.rows]
        body = '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)
        return f'**{self.title}**\n\n{body}\n'


@dataclass
class Report:
    """What a benchmark found."""

    settings: dict  # what was run, for programs
    results: Sequence  # every measurement, for programs: dictionaries or dataclasses
    tables: list[Table]  # the same for people
    notes: list[str] = field(default_factory=list)  # sentences for below the tables
    further: dict = field(default_factory=dict)  # what else programs get
    page: dict | None = None  # what the page shows beside the tables
    template: str = 'compare.html'  # of the page
    machine: dict[str, str] = field(default_factory=dict)  # what it ran on
    command: str = ''  # what repeats it

    @property
    def machine_line(self) -> str:
        return ', '.join(f'{name}: {text}' for name, text in self.machine.items())

    def as_json(self) -> dict:
        return {
            'machine': self.machine,
            'settings': self.settings,
            'command': self.command,
            'results': self.results,
            **self.further,
        }

    def markdown(self) -> str:
        tables = [table.markdown() for table in self.tables]
        return '\n'.join([f'{self.machine_line}\n', *tables, *self.notes]) + '\n'

    def html(self) -> str:
        """A page that stands alone: no network, no scripts, readable on a phone."""
        return render(self.template, report=self, **self.page)


def render(template: str, **content: object) -> str:
    """Fill in one of the pages in ``templates/``."""
    return _environment().get_template(template).render(content)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader('mmlite.analysis', 'templates'),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def timing_columns(timing: Callable[[Any], Timing]) -> Columns:
    """Median, mean and 95th percentile in ms of what ``timing`` takes from an item."""
    return {
        f'{name} ms': lambda item, name=name: milliseconds(getattr(timing(item), name))
        for name in ('median', 'mean', 'p95')
    }


def milliseconds(seconds: float) -> str:
    """Three significant digits, in ms."""
    value = 1000 * seconds
    return f'{value:.0f}' if value >= 100 else f'{value:#.3g}'


def mebibytes(num_bytes: int | None) -> str:
    """In MiB; a dash where it is not known."""
    return '-' if num_bytes is None else f'{num_bytes / 2**20:.1f}'


def giga(count: float) -> str:
    """In units of 10^9."""
    return f'{count / 1e9:.1f}'


def size(height_width: Sequence[int]) -> str:
    """``800x1333``."""
    return 'x'.join(map(str, height_width))
