"""Results as people and programs read them: tables, plots, pages, JSON."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .timing import Timing

# Readable for the colour-blind (Okabe and Ito's palette).
COLORS = ('#0072b2', '#56b4e9', '#d55e00', '#e69f00', '#009e73', '#999999')
BASELINE, VARIANT = '#444444', '#d55e00'


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

    def markdown(self) -> str:
        """The table in GitHub's Markdown, its title as a bold line above."""
        lines = [self.columns, ['---', *['---:'] * (len(self.columns) - 1)], *self.rows]
        body = '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
        return f'**{self.title}**\n\n{body}\n'


@dataclass
class Report:
    """What a benchmark found."""

    settings: dict  # what was run, for programs
    results: Sequence  # every measurement, for programs: dictionaries or dataclasses
    tables: list[Table]  # the same for people
    notes: list[str] = field(default_factory=list)  # sentences for below the tables
    further: dict = field(default_factory=dict)  # what else programs get
    # What the page shows beside the tables: title, intro, headline (cards), figures (caption and
    # SVG), and how it was measured.
    page: dict | None = None
    machine: dict[str, str] = field(default_factory=dict)  # what it ran on
    command: str = ''  # what repeats it

    @property
    def machine_line(self) -> str:
        return ', '.join(f'{name}: {text}' for name, text in self.machine.items())

    def as_json(self) -> dict:
        head = {'machine': self.machine, 'settings': self.settings, 'command': self.command}
        return {**head, 'results': self.results, **self.further}

    def markdown(self) -> str:
        tables = [table.markdown() for table in self.tables]
        return '\n'.join([f'{self.machine_line}\n', *tables, *self.notes]) + '\n'

    def html(self) -> str:
        """A page that stands alone: no network, no scripts, readable on a phone."""
        return render(report=self, **self.page)


def render(**content: object) -> str:
    """Fill in ``templates/page.html``."""
    import jinja2

    loader = jinja2.PackageLoader('mmlite.analysis', 'templates')
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template('page.html').render(content)


def plot(draw: Callable[..., None], *arguments) -> str:
    """Draw on a figure's axes and return it as SVG for a page."""
    import matplotlib
    from matplotlib.figure import Figure

    # Drawn at the width of a phone, so that the text keeps its size there.
    style = {'svg.fonttype': 'none', 'font.size': 9, 'font.family': 'sans-serif'}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 3.3), layout='constrained')
        axes = figure.add_subplot()
        axes.spines[['top', 'right']].set_visible(False)
        draw(axes, *arguments)
        target = io.StringIO()
        # No date, so that equal results make equal pages.
        figure.savefig(target, format='svg', metadata={'Date': None}, transparent=True)
    svg = target.getvalue()
    return svg[svg.index('<svg') :]


def scatter(
    axes: Any, points: list[tuple[str, float, float, dict]], x_label: str, y_label: str
) -> None:
    """Label points from the lowest up, each above the label below it."""
    axes.set(xlabel=x_label, ylabel=y_label)
    for _, x, y, style in points:
        axes.plot(x, y, **style)
    axes.set_xlim(0, 1.4 * axes.get_xlim()[1])
    (_, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set_autoscale_on(False)
    line = {'arrowstyle': '-', 'lw': 0.4, 'color': '#999999', 'shrinkA': 0}
    look = {'textcoords': ('data', 'axes fraction'), 'fontsize': 7, 'va': 'center'}
    below = -1.0
    for name, x, y, _ in sorted(points, key=lambda point: point[2]):
        if name:
            below = max((y - bottom) / (top - bottom), below + 0.055)
            place = (x + 0.03 * right, below)
            axes.annotate(name, (x, y), xytext=place, arrowprops=line, **look)


def times(timing: Timing) -> dict[str, str]:
    """The cells of a timing: median, mean and 95th percentile in ms."""
    names = ('median', 'mean', 'p95')
    return {f'{name} ms': milliseconds(getattr(timing, name)) for name in names}


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
