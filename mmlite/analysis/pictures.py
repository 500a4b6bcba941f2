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
from mmengine.visualization.utils import img_from_canvas
from torch import Tensor

from ..export.drawing import draw
from .attention import QueryAttention

_MARK = '#00e5ff'


def draw_attention(image: np.ndarray, rows: Sequence[tuple[str, QueryAttention]]) -> Figure:
    """Sampling points over RGB pixels, (H, W, 3), coloured by weight.

    A row for each detector, which has a name; a column for each level and one for all of them.
    """
    maps = [seen.attention for _, seen in rows]
    columns = max(len(one.spatial_shapes) for one in maps) + 1
    height = 3.0 * image.shape[0] / image.shape[1] + 0.6
    figure = _figure(3.0 * columns, height * len(rows))
    colors = {'vmin': 0, 'vmax': max(float(one.weights.max()) for one in maps), 'cmap': 'plasma'}
    for strip, (name, seen) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows):
        strip.suptitle(f'{name}: {seen.where}', x=0.01, ha='left', fontsize=10)
        axes = strip.subplots(1, columns)
        panels = {'all levels': slice(None)}
        masses = seen.attention.weights[0].sum(-1).mean(0).tolist()  # over the heads
        for level, ((h, w), mass) in enumerate(zip(seen.attention.spatial_shapes, masses)):
            panels[f'level {level + 1} ({h}x{w}): {mass:.0%}'] = slice(level, level + 1)
        for axis in axes:
            axis.set_axis_off()
        for axis, (title, levels) in zip([axes[-1], *axes[:-1]], panels.items()):
            axis.set_title(title, fontsize=9)
            axis.imshow(image, alpha=0.75)
            _mark_query(axis, seen)
            points = seen.attention.locations[0, :, levels].numpy() * np.array(seen.scale)
            weights = seen.attention.weights[0, :, levels].numpy().ravel()
            order = np.argsort(weights)  # the heaviest on top
            x, y = points.reshape(-1, 2)[order].T
            dots = axis.scatter(x, y, c=weights[order], s=14, linewidths=0, **colors)
            axis.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
        strip.colorbar(dots, ax=axes, label='weight', shrink=0.8, pad=0.01)
    return figure


def _mark_query(axis: Axes, seen: QueryAttention) -> None:
    if seen.point:
        axis.plot(*seen.point, '+', color=_MARK, markersize=11, markeredgewidth=2)
    if seen.box:
        x1, y1, x2, y2 = seen.box
        look = {'fill': False, 'color': _MARK, 'linewidth': 1.5}
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **look))


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
    panel_height = panel_width * height / width + 0.4
    figure = _figure(panel_width * len(rows[0]), panel_height * len(rows))
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
    figure = _figure(1.9 * layers + 1, 2.3 * len(masses) + 0.4)
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
    return img_from_canvas(FigureCanvasAgg(figure))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout='constrained')
