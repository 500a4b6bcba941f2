"""Results as people and programs read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .latency import Timing


@dataclass
class Table:
    """A table of texts.

    Attributes:
        title (str): What it shows.
        columns (Sequence[str]): Heads of the columns; the first names the row.
        rows (list[Sequence[str]]): Cells.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table in GitHub's Markdown, its title as a bold line above."""
        lines = [self.columns, ['---', *['---:'] * (len(self.columns) - 1)], *self.rows]
        body = '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)
        return f'**{self.title}**\n\n{body}\n'


def milliseconds(seconds: float) -> str:
    """Three significant digits, in ms."""
    value = 1000 * seconds
    return f'{value:.0f}' if value >= 100 else f'{value:#.3g}'


def timing_cells(timing: Timing) -> tuple[str, str, str]:
    """Median, mean and 95th percentile in ms."""
    return milliseconds(timing.median), milliseconds(timing.mean), milliseconds(timing.p95)


def mebibytes(num_bytes: int | None) -> str:
    """In MiB; a dash where it is not known."""
    return '-' if num_bytes is None else f'{num_bytes / 2**20:.1f}'


def giga(count: float) -> str:
    """In units of 10^9."""
    return f'{count / 1e9:.1f}'
