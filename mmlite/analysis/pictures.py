"""Pictures of what a detector attends to and detects."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.structures import InstanceData
from torch import Tensor

from ..export.drawing import draw
from .attention import QueryAttention

_MARK = '#00e5ff'
DPI = 110


def draw_attention(image: np.ndarray, seen: Sequence[QueryAttention]) -> Figure:
    """Sampling points over RGB pixels, (H, W, 3), coloured by weight.

    A row for each detector, a column for each level and one for all of them.
    """
    levels = max(len(one.attention.spatial_shapes) for one in seen)
    height = 3.0 * image.shape[0] / image.shape[1] + 0.6
    figure = Figure(figsize=(3.0 * (levels + 1), height * len(seen)), layout='constrained')
    top = max(float(one.attention.weights.max()) for one in seen)
    for strip, one in zip(figure.subfigures(len(seen), 1, squeeze=False)[:, 0], seen):
        row = strip.subplots(1, levels + 1)
        strip.suptitle(f'{one.name}: {one.where}', x=0.01, ha='left', fontsize=10)
        panels = {'all levels': slice(None)}
        for level, (h, w) in enumerate(one.attention.spatial_shapes):
            mass = float(one.attention.level_mass()[0, level])
            panels[f'level {level + 1} ({h}x{w}): {mass:.0%}'] = slice(level, level + 1)
        for axis in row:
            axis.set_axis_off()
        for axis, (title, chosen) in zip([row[-1], *row[:-1]], panels.items()):
            axis.set_title(title, fontsize=9)
            axis.imshow(image, alpha=0.75)
            dots = _draw_points(axis, one, chosen, top)
            axis.set_xlim(0, image.shape[1])
            axis.set_ylim(image.shape[0], 0)
        strip.colorbar(dots, ax=row, label='weight', shrink=0.8, pad=0.01)
    return figure


def _draw_points(axis: Axes, one: QueryAttention, levels: slice, top: float):
    """Draw the query and its points on some levels."""
    points = one.attention.locations[0, :, levels].numpy() * np.array(one.scale)  # (M, L, P, 2)
    weights = one.attention.weights[0, :, levels].numpy().ravel()
    order = np.argsort(weights)  # the heaviest on top
    x, y = points.reshape(-1, 2)[order].T
    if one.point:
        axis.plot(*one.point, '+', color=_MARK, markersize=11, markeredgewidth=2)
    if one.box:
        x1, y1, x2, y2 = one.box
        box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=_MARK, linewidth=1.5)
        axis.add_patch(box)
    return axis.scatter(x, y, c=weights[order], s=14, vmin=0, vmax=top, cmap='plasma', linewidths=0)


def draw_objects(image: np.ndarray, objects: InstanceData, names: Sequence[str]) -> np.ndarray:
    """Objects over BGR pixels, (H, W, 3), in RGB; small images are enlarged.

    They have ``bboxes`` and ``labels``, and where there are some ``scores`` and ``masks``.
    """
    kinds = {'boxes': 'bboxes', 'labels': 'labels', 'scores': 'scores', 'masks': 'masks'}
    found = {kind: objects.get(name) for kind, name in kinds.items()}
    for kind, values in found.items():
        if values is not None:
            values = values.cpu().numpy() if isinstance(values, Tensor) else values.to_ndarray()
            found[kind] = values.astype(bool) if kind == 'masks' else values
    return draw(image, SimpleNamespace(**found), names)[..., ::-1]


def draw_panels(
    rows: Sequence[Sequence[tuple[str, np.ndarray]]], panel_width: float = 5.0
) -> Figure:
    """Images of one size in a grid: rows of titles and pixels, (H, W, 3); width in inches."""
    height, width = rows[0][0][1].shape[:2]
    size = (panel_width * len(rows[0]), len(rows) * (panel_width * height / width + 0.4))
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axis, (title, pixels) in zip(axes.flat, itertools.chain(*rows)):
        axis.set_title(title, fontsize=10, loc='left')
        axis.imshow(pixels)
        axis.set_axis_off()
    return figure


def draw_level_masses(masses: Mapping[str, Tensor]) -> Figure:
    """Heat maps of where the encoders' attention goes: a row a detector, a panel a layer.

    ``masses``: name of a detector -> mean of :func:`~mmlite.analysis.attention.level_masses`.
    """
    layers = max(map(len, masses.values()))
    figure = Figure(figsize=(1.9 * layers + 1, 2.3 * len(masses) + 0.4), layout='constrained')
    axes = figure.subplots(len(masses), layers, squeeze=False)
    colors = matplotlib.colormaps['viridis'].with_extremes(bad='#e8e8e8')
    for row, (name, mass) in zip(axes, masses.items()):
        for axis in row[len(mass) :]:
            axis.set_axis_off()
        for index, (axis, values) in enumerate(zip(row, mass.numpy())):
            shown = axis.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap=colors)
            for y, x in np.argwhere(np.isfinite(values)):
                look = {'color': 'white' if values[y, x] < 0.6 else 'black', 'fontsize': 6}
                axis.text(x, y, f'{values[y, x]:.0%}', ha='center', va='center', **look)
            for set_ticks in (axis.set_xticks, axis.set_yticks):
                set_ticks(range(len(values)), range(1, len(values) + 1), fontsize=7)
            axis.set_title(f'layer {index + 1}', fontsize=8)
        row[0].set_ylabel(f'{name}\nlevel of the query (1: largest map)', fontsize=8)
        row[len(mass) // 2].set_xlabel('level of the sampled points', fontsize=8)
    figure.colorbar(shown, ax=axes, label='share of the attention', shrink=0.8, pad=0.01)
    return figure


def pixels_of(figure: Figure) -> np.ndarray:
    """The figure as RGB pixels, uint8, shape (H, W, 3)."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
