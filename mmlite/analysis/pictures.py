"""Pictures of what a detector attends to and detects."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from torch import Tensor

from .attention import QueryAttention
from .report import render

_MARK = '#00e5ff'


def draw_attention(image: np.ndarray, seen: Sequence[QueryAttention]) -> Figure:
    """Sampling points over RGB pixels, (H, W, 3), coloured by weight.

    A row for each detector, a column for each level and one for all of them.
    """
    levels = max(len(one.attention.spatial_shapes) for one in seen)
    height = 3.0 * image.shape[0] / image.shape[1] + 0.6
    figure = Figure(figsize=(3.0 * (levels + 1), height * len(seen)), layout='constrained')
    strips = figure.subfigures(len(seen), 1, squeeze=False)[:, 0]
    top = max(float(one.attention.weights.max()) for one in seen)
    for strip, one in zip(strips, seen):
        row = strip.subplots(1, levels + 1)
        strip.suptitle(f'{one.name}: {one.where}', x=0.01, ha='left', fontsize=10)
        attention = one.attention
        points = attention.locations[0].numpy() * np.array(one.scale)  # (M, L, P, 2)
        weights = attention.weights[0].numpy()
        panels = {'all levels': slice(None)}
        for level, (h, w) in enumerate(attention.spatial_shapes):
            mass = float(attention.level_mass()[0, level])
            panels[f'level {level + 1} ({h}x{w}): {mass:.0%}'] = slice(level, level + 1)
        for axis, (title, chosen) in zip([row[-1], *row[:-1]], panels.items()):
            axis.set_title(title, fontsize=9)
            axis.imshow(image, alpha=0.75)
            p, w = points[:, chosen].reshape(-1, 2), weights[:, chosen].ravel()
            order = np.argsort(w)  # the heaviest on top
            dots = axis.scatter(
                *p[order].T, c=w[order], s=14, vmin=0, vmax=top, cmap='plasma', linewidths=0
            )
            if one.point:
                axis.plot(*one.point, '+', color=_MARK, markersize=11, markeredgewidth=2)
            if one.box:
                x1, y1, x2, y2 = one.box
                size = (x2 - x1, y2 - y1)
                axis.add_patch(Rectangle((x1, y1), *size, fill=False, color=_MARK, linewidth=1.5))
            axis.set_xlim(0, image.shape[1])
            axis.set_ylim(image.shape[0], 0)
        for axis in row:
            axis.set_axis_off()
        strip.colorbar(dots, ax=row, label='weight', shrink=0.8, pad=0.01)
    return figure


def draw_boxes(image: np.ndarray, instances: InstanceData, names: Sequence[str]) -> np.ndarray:
    """Objects over an image, by MMDetection's visualizer.

    Args:
        image (np.ndarray): RGB pixels, shape (H, W, 3).
        instances (InstanceData): ``bboxes``, ``labels``, of detections ``scores``, and ``masks``
            where there are some.
        names (Sequence[str]): Names of the classes; one that is missing shows as its number.

    Returns:
        np.ndarray: RGB pixels, shape (H, W, 3); small images are enlarged.
    """
    instances = instances.clone()
    # The visualizer's lines and letters have a size in pixels, which would hide a small image.
    factor = max(1, 480 // max(image.shape))
    image = image.repeat(factor, 0).repeat(factor, 1)
    instances.bboxes = factor * instances.bboxes.detach()  # the visualizer wants NumPy's arrays
    if 'masks' in instances:
        masks = instances.masks
        masks = masks.numpy() if isinstance(masks, Tensor) else masks.to_ndarray()
        instances.masks = masks.repeat(factor, 1).repeat(factor, 2)
    instances.label_names = [
        names[label] if label < len(names) else f'class {label}' for label in instances.labels
    ]
    visualizer = DetLocalVisualizer()
    # As ground truth, of which it draws everything.
    sample = DetDataSample(gt_instances=instances)
    visualizer.add_datasample('', image, sample, draw_pred=False)
    return visualizer.get_image()


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


def draw_level_masses(masses: Sequence[tuple[str, Tensor]]) -> Figure:
    """Heat maps of where the encoders' attention goes: a row a detector, a panel a layer.

    ``masses`` holds the name of each detector and, averaged over a data set, what
    :func:`~mmlite.analysis.attention.level_masses` returns.
    """
    layers = max(len(mass) for _, mass in masses)
    figure = Figure(figsize=(1.9 * layers + 1, 2.3 * len(masses) + 0.4), layout='constrained')
    axes = figure.subplots(len(masses), layers, squeeze=False)
    colors = matplotlib.colormaps['viridis'].with_extremes(bad='#e8e8e8')
    for row, (name, mass) in zip(axes, masses):
        for axis in row[len(mass) :]:
            axis.set_axis_off()
        for index, (axis, values) in enumerate(zip(row, mass.numpy())):
            shown = axis.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap=colors)
            for (y, x), value in np.ndenumerate(values):
                if np.isfinite(value):
                    ink = 'white' if value < 0.6 else 'black'
                    axis.text(x, y, f'{value:.0%}', ha='center', va='center', color=ink, fontsize=6)
            labels = range(1, len(values) + 1)
            axis.set_xticks(range(len(labels)), labels, fontsize=7)
            axis.set_yticks(range(len(labels)), labels, fontsize=7)
            axis.set_title(f'layer {index + 1}', fontsize=8)
        row[0].set_ylabel(f'{name}\nlevel of the query (1: largest map)', fontsize=8)
        row[len(mass) // 2].set_xlabel(
            'level of the sampled points (1 is the largest map)', fontsize=8
        )
    figure.colorbar(shown, ax=axes, label='share of the attention', shrink=0.8, pad=0.01)
    return figure


def pixels_of(figure: Figure, dpi: int = 110) -> np.ndarray:
    """The figure as RGB pixels, uint8, shape (H, W, 3)."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png_and_page(figure: Figure, caption: str, dpi: int = 110) -> tuple[bytes, str]:
    """The figure as a PNG file and as a page of HTML that stands alone."""
    target = io.BytesIO()
    figure.savefig(target, format='png', dpi=dpi)
    encoded = base64.b64encode(target.getvalue()).decode()
    return target.getvalue(), render(title=caption, picture=encoded)
