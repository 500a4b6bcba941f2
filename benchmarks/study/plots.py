"""Plots as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Readable for the colour-blind (Okabe and Ito's palette).
COLORS = ('#0072b2', '#56b4e9', '#d55e00', '#e69f00', '#009e73', '#999999')
BASELINE = '#444444'


def plot(draw: Callable[..., None], *arguments) -> str:
    """Draw on a figure's axes and return it as SVG for a page."""
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
    axes: Axes, points: list[tuple[str, float, float, dict]], x_label: str, y_label: str
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
        below = max((y - bottom) / (top - bottom), below + 0.055)
        axes.annotate(name, (x, y), xytext=(x + 0.03 * right, below), arrowprops=line, **look)
