"""How plots of reports look."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Readable for the colour-blind (Okabe and Ito's palette).
COLORS = ('#0072b2', '#56b4e9', '#d55e00', '#e69f00', '#009e73', '#999999')
BASELINE, VARIANT = '#444444', '#d55e00'


def plot(draw: Callable[..., None], *arguments) -> str:
    """Draw on axes of a figure and return it as SVG to stand in a page."""
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


def on_white(svg: str) -> str:
    """The same to stand in a file, which may be shown on a page of any colour."""
    return svg.replace('<svg', '<svg style="background: white"', 1)


def scatter(
    axes: Axes, points: list[tuple[str, float, float, dict]], x_label: str, y_label: str
) -> None:
    """Points with names, from the lowest up, each high enough to clear the one below it."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for _, x, y, style in points:
        axes.plot(x, y, **style)
    axes.set_xlim(0, 1.4 * axes.get_xlim()[1])
    (_, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set_autoscale_on(False)
    below = -1.0
    for name, x, y, _ in sorted(points, key=lambda point: point[2]):
        if name:
            below = max((y - bottom) / (top - bottom), below + 0.055)
            axes.annotate(
                name,
                (x, y),
                xytext=(x + 0.03 * right, below),
                textcoords=('data', 'axes fraction'),
                fontsize=7,
                va='center',
                arrowprops={'arrowstyle': '-', 'lw': 0.4, 'color': '#999999', 'shrinkA': 0},
            )
