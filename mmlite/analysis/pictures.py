"""Pictures of what a detector attends to and detects."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmdet.apis import inference_detector
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import Tensor, nn

from .attention import (
    AttentionMap,
    deformable_attentions,
    first_token,
    level_masses,
    record_attention,
)

Box = tuple[float, float, float, float]
Run = Callable[[], DetDataSample]


@dataclass(frozen=True)
class Sight:
    """What one detector attends to at one place of an image.

    Attributes:
        name (str): The detector.
        where (str): Which attention, in words.
        attention (AttentionMap): Of one query.
        scale (tuple[float, float]): Pixels of the image for a normalised location of 1, (x, y).
        point (tuple[float, float] | None): The query's place in the image.
        box (tuple | None): The detected object, (x1, y1, x2, y2).
    """

    name: str
    where: str
    attention: AttentionMap
    scale: tuple[float, float]
    point: tuple[float, float] | None = None
    box: Box | None = None


def prepare(model: nn.Module, config: Config) -> None:
    """Give a built model what mmdet's inference functions look for on it.

    Raises:
        ValueError: The detector has no encoder with deformable attention.
    """
    if not any(name.startswith('encoder.') for name in deformable_attentions(model)):
        raise ValueError(
            f'{type(model).__name__} has no encoder with deformable attention to look into'
        )
    model.cfg = config
    model.dataset_meta = {'classes': class_names(config)}


def run_on(model: nn.Module, image: str | np.ndarray) -> Run:
    """What runs a detector prepared by :func:`prepare` on an image: a path or BGR pixels."""
    return lambda: inference_detector(model, image)


def class_names(config: Config) -> tuple[str, ...]:
    """Classes of a config's test data set, by default COCO's."""
    from mmdet.datasets import CocoDataset

    meta = config.get('test_dataloader', {}).get('dataset', {}).get('metainfo') or {}
    return tuple(meta.get('classes', CocoDataset.METAINFO['classes']))


def label_text(model: nn.Module, label: int) -> str:
    """Name of a class, or its number where the config does not name it."""
    classes = model.dataset_meta['classes']
    return classes[label] if label < len(classes) else f'class {label}'


def look_at_point(
    model: nn.Module,
    run: Run,
    point: tuple[float, float],
    *,
    name: str = '',
    layer: int = -1,
    level: int | None = None,
) -> Sight:
    """What the encoder's token at a point attends to.

    Args:
        model (nn.Module): A detector with a deformable encoder.
        run (Callable[[], DetDataSample]): Runs it on the image, such as :func:`run_on` does.
        point (tuple[float, float]): (x, y) in pixels of the image.
        name (str): What to call the detector.
        layer (int): Encoder layer, negative from the last.
        level (int, optional): Level of the token, 0 the largest map; by default the largest that
            the layer updates.

    Returns:
        Sight: What it sees.

    Raises:
        ValueError: The point is outside the image, there is no such layer or level, or the layer
            does not update that level.
    """
    layers = len(model.encoder.layers)
    if not -layers <= layer < layers:
        raise ValueError(f'layer must be between 0 and {layers - 1}; got {layer}')
    layer %= layers
    attention = f'encoder.layers.{layer}.self_attn'
    frame = _Frame(model)

    chosen_level = level

    def choose(num_queries: int) -> Tensor:
        nonlocal chosen_level
        shapes = frame.spatial_shapes
        sizes = [h * w for h, w in shapes]
        first = first_token(model, layer, num_queries, sum(sizes))
        if level is None:
            chosen_level = next(i for i in range(len(sizes)) if sum(sizes[:i]) >= first)
        if not 0 <= chosen_level < len(shapes):
            raise ValueError(f'level must be between 0 and {len(shapes) - 1}; got {level}')
        image_height, image_width = frame.ori_shape
        if not (0 <= point[0] < image_width and 0 <= point[1] < image_height):
            raise ValueError(
                f'point {point} is outside the image of {image_width}x{image_height} pixels '
                '(width x height)'
            )
        height, width = shapes[chosen_level]
        x, y = (p / s for p, s in zip(point, frame.scale))
        token = sum(sizes[:chosen_level]) + int(y * height) * width + int(x * width)
        if not first <= token < first + num_queries:
            raise ValueError(
                f'encoder layer {layer} does not update level {level}; choose another layer or '
                'level'
            )
        return torch.tensor([token - first])

    with frame, record_attention(model, {attention: choose}) as maps:
        run()
    where = f'encoder layer {layer + 1}, token of level {chosen_level + 1}'
    return Sight(name, where, maps[attention], frame.scale, point=point)


def look_at_object(
    model: nn.Module, run: Run, rank: int = 0, *, name: str = '', layer: int = -1
) -> Sight:
    """What the decoder's query of a detected object attends to.

    Args:
        model (nn.Module): A detector prepared by :func:`prepare`.
        run (Callable[[], DetDataSample]): Runs it on the image, such as :func:`run_on` does.
        rank (int): 0 for the object with the highest score.
        name (str): What to call the detector.
        layer (int): Decoder layer, negative from the last.

    Returns:
        Sight: What it sees.

    Raises:
        ValueError: There is no such layer or object.
    """
    layers = len(model.decoder.layers)
    if not -layers <= layer < layers:
        raise ValueError(f'layer must be between 0 and {layers - 1}; got {layer}')
    layer %= layers
    attention = f'decoder.layers.{layer}.cross_attn'
    frame = _Frame(model)
    scores: list[Tensor] = []

    def remember(module: nn.Module, args: tuple, output: tuple) -> None:
        scores.append(output[0][-1][0])  # logits of the last layer, shape (queries, classes)

    hook = model.bbox_head.register_forward_hook(remember)
    try:
        with frame, record_attention(model, {attention: torch.arange}) as maps:
            found = run().pred_instances
    finally:
        hook.remove()
    if not 0 <= rank < len(found):
        raise ValueError(f'object must be between 0 and {len(found) - 1}; got {rank}')
    # The head ranks (query, class) pairs by score, so the rank leads back to the query.
    query = int(scores[0].flatten().topk(rank + 1).indices[rank] // scores[0].shape[1])
    seen = maps[attention]
    one = AttentionMap(
        torch.tensor([query]),
        seen.num_queries,
        seen.locations[query : query + 1],
        seen.weights[query : query + 1],
        seen.spatial_shapes,
    )
    label = label_text(model, int(found.labels[rank]))
    where = f'decoder layer {layer + 1}, {label} {found.scores[rank]:.2f}'
    return Sight(name, where, one, frame.scale, box=tuple(found.bboxes[rank].tolist()))


class _Frame:
    """Learns, while a detector runs, how its input relates to the image."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.spatial_shapes: list[tuple[int, int]] = []
        self.scale = (1.0, 1.0)
        self.ori_shape = (0, 0)

    def __enter__(self) -> _Frame:
        def sizes(module: nn.Module, args: tuple, kwargs: dict) -> None:
            meta = kwargs['data_samples'][0].metainfo
            height, width = meta['batch_input_shape']
            factor = meta.get('scale_factor', (1.0, 1.0))
            self.scale = (width / factor[0], height / factor[1])
            self.ori_shape = tuple(meta['ori_shape'][:2])

        def shapes(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.spatial_shapes = [tuple(s) for s in kwargs['spatial_shapes'].tolist()]

        self._hooks = [
            self._model.register_forward_pre_hook(sizes, with_kwargs=True),
            self._model.encoder.register_forward_pre_hook(shapes, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def draw_attention(image: np.ndarray, sights: Sequence[Sight]) -> Figure:
    """Sampling points on every level, coloured by weight, a row for each detector.

    Args:
        image (np.ndarray): RGB pixels, shape (H, W, 3).
        sights (Sequence[Sight]): What each detector sees.

    Returns:
        Figure: One column for each level and one for all of them.
    """
    levels = max(len(sight.attention.spatial_shapes) for sight in sights)
    height = 3.0 * image.shape[0] / image.shape[1] + 0.6
    figure = Figure(figsize=(3.0 * (levels + 1), height * len(sights)), layout='constrained')
    strips = figure.subfigures(len(sights), 1, squeeze=False)[:, 0]
    top = max(float(sight.attention.weights.max()) for sight in sights)
    for strip, sight in zip(strips, sights):
        row = strip.subplots(1, levels + 1)
        strip.suptitle(f'{sight.name}: {sight.where}', x=0.01, ha='left', fontsize=10)
        seen = sight.attention
        points = seen.locations[0].numpy() * np.array(sight.scale)  # (M, L, P, 2)
        weights = seen.weights[0].numpy()
        mass = seen.level_mass()[0].tolist()
        for level in range(levels + 1):
            axis = row[level]
            axis.set_axis_off()
            everything = level == levels
            if not everything and level >= len(seen.spatial_shapes):
                continue
            axis.imshow(image, alpha=0.75)
            chosen = slice(None) if everything else slice(level, level + 1)
            p, w = points[:, chosen].reshape(-1, 2), weights[:, chosen].ravel()
            order = np.argsort(w)  # the heaviest on top
            dots = axis.scatter(
                *p[order].T, c=w[order], s=14, vmin=0, vmax=top, cmap='plasma', linewidths=0
            )
            if sight.point:
                axis.plot(*sight.point, '+', color='#00e5ff', markersize=11, markeredgewidth=2)
            if sight.box:
                _rectangle(axis, sight.box, '#00e5ff')
            axis.set_xlim(0, image.shape[1])
            axis.set_ylim(image.shape[0], 0)
            if everything:
                axis.set_title('all levels', fontsize=9)
            else:
                h, w_ = seen.spatial_shapes[level]
                axis.set_title(f'level {level + 1} ({h}x{w_}): {mass[level]:.0%}', fontsize=9)
        strip.colorbar(dots, ax=row, label='weight', shrink=0.8, pad=0.01)
    return figure


def draw_detections(
    image: np.ndarray,
    panels: Sequence[tuple[str, Sequence[Box], Sequence[str]]],
) -> Figure:
    """Boxes over an image, one panel beside the other.

    Args:
        image (np.ndarray): RGB pixels, shape (H, W, 3).
        panels (Sequence[tuple]): Title, boxes (x1, y1, x2, y2) and their texts.

    Returns:
        Figure: The panels.
    """
    height = 5.0 * image.shape[0] / image.shape[1] + 0.4
    figure = Figure(figsize=(5.0 * len(panels), height), layout='constrained')
    classes = sorted({text.split()[0] for _, _, texts in panels for text in texts})
    for axis, (title, boxes, texts) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels
    ):
        axis.set_title(title, fontsize=10)
        show_boxes(axis, image, boxes, texts, classes)
    return figure


def show_boxes(
    axis: Axes,
    image: np.ndarray,
    boxes: Sequence[Box],
    texts: Sequence[str],
    classes: Sequence[str],
) -> None:
    """Boxes over an image, a colour a class.

    Args:
        axis (Axes): Where to draw.
        image (np.ndarray): RGB pixels, shape (H, W, 3).
        boxes (Sequence): Boxes (x1, y1, x2, y2) in pixels.
        texts (Sequence[str]): Their texts, each beginning with a class name.
        classes (Sequence[str]): The class names, in the order of the colours.
    """
    axis.imshow(image)
    axis.set_axis_off()
    for box, text in zip(boxes, texts):
        number = next(i for i, name in enumerate(classes) if text.startswith(name))
        color = f'C{number % 10}'
        _rectangle(axis, box, color)
        axis.text(*box[:2], text, color='white', backgroundcolor=color, fontsize=7)


def _rectangle(axis, box: Box, color: str) -> None:
    x1, y1, x2, y2 = box
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.5))


def draw_level_masses(masses: Sequence[tuple[str, Tensor]]) -> Figure:
    """Heat maps of where the encoder's attention goes.

    Args:
        masses (Sequence[tuple[str, Tensor]]): Name of a detector and, averaged over a data set,
            what :func:`~mmlite.analysis.attention.level_masses` returns.

    Returns:
        Figure: A row for each detector, a panel for each encoder layer.
    """
    layers = max(len(mass) for _, mass in masses)
    figure = Figure(figsize=(1.9 * layers + 1, 2.3 * len(masses) + 0.4), layout='constrained')
    axes = figure.subplots(len(masses), layers, squeeze=False)
    colors = matplotlib.colormaps['viridis'].with_extremes(bad='#e8e8e8')
    for row, (name, mass) in zip(axes, masses):
        for index, axis in enumerate(row):
            if index >= len(mass):
                axis.set_axis_off()
                continue
            values = mass[index].numpy()
            shown = axis.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap=colors)
            for (y, x), value in np.ndenumerate(values):
                if np.isfinite(value):
                    ink = 'white' if value < 0.6 else 'black'
                    axis.text(x, y, f'{value:.0%}', ha='center', va='center', color=ink, fontsize=6)
            labels = range(1, values.shape[0] + 1)
            axis.set_xticks(range(len(labels)), labels, fontsize=7)
            axis.set_yticks(range(len(labels)), labels, fontsize=7)
            axis.set_title(f'layer {index + 1}', fontsize=8)
        row[0].set_ylabel(f'{name}\nlevel of the query (1: largest map)', fontsize=8)
        row[len(mass) // 2].set_xlabel(
            'level of the sampled points (1 is the largest map)', fontsize=8
        )
    figure.colorbar(shown, ax=axes, label='share of the attention', shrink=0.8, pad=0.01)
    return figure


def mean_level_masses(model: nn.Module, images: Sequence[str], on_step=lambda: None) -> Tensor:
    """:func:`~mmlite.analysis.attention.level_masses`, mean over images.

    Args:
        model (nn.Module): A detector prepared by :func:`prepare`.
        images (Sequence[str]): Paths.
        on_step (Callable[[], None]): Called after each image.

    Returns:
        Tensor: shape (layers, L, L).
    """
    total = []
    for path in images:
        total.append(level_masses(model, run_on(model, path)))
        on_step()
    return torch.stack(total).mean(0)


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG file."""
    target = io.BytesIO()
    figure.savefig(target, format='png', dpi=dpi)
    return target.getvalue()


def pixels_of(figure: Figure, dpi: int = 110) -> np.ndarray:
    """The figure as RGB pixels, uint8, shape (H, W, 3)."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def page(title: str, pictures: Sequence[tuple[str, bytes]]) -> str:
    """A page that stands alone, with captions and PNG pictures.

    Args:
        title (str): Head of the page.
        pictures (Sequence[tuple[str, bytes]]): Caption and PNG of each.

    Returns:
        str: HTML.
    """
    encoded = [(caption, base64.b64encode(data).decode()) for caption, data in pictures]
    return _template().render(title=title, pictures=encoded)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader('mmlite.analysis', 'templates')
    return jinja2.Environment(loader=loader, autoescape=True).get_template('pictures.html')
