"""Which schedule, image size and depth of the decoder are the most accurate within a time.

One set of elastic weights is a detector for each of its schedules. Every choice is timed on this
machine, in the runtime that it is for, in turns with all others, and measured on images.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from torch import nn

from ..export.detector import Detections, Detector, load
from ..export.int8 import coco_ap, quantize
from ..export.pytorch import pytorch_detector
from ..export.write import export_detector
from ..models import use_schedule
from ..nn import InterleavedEncoder
from ..openmmlab.families import encoder_name, find_holder, type_name
from .accuracy import Dataset
from .contestants import FORMATS, need_runtime, session_call
from .report import Table, milliseconds, size
from .timing import Call, Setting, Start, measure, silent


@dataclass(frozen=True)
class Choice:
    """One way to run a detector."""

    schedule: str
    image_size: tuple[int, int]  # (h, w) that images are fitted into
    decoder_layers: int
    precision: str = 'float32'

    def __str__(self) -> str:
        return (
            f'{self.schedule}, {size(self.image_size)}, {self.decoder_layers} decoder layers, '
            f'{self.precision}'
        )


@dataclass
class Point:
    """What a choice costs and finds."""

    choice: Choice
    seconds: float  # median of an image
    accuracy: float  # AP in percent, or agreement in percent where there are no labels
    call: Call  # what was timed

    def as_json(self) -> dict:
        return {**asdict(self.choice), 'seconds': self.seconds, 'accuracy': self.accuracy}

    def cells(self) -> dict[str, str]:
        """A row of a table."""
        c = self.choice
        return {
            'schedule': c.schedule,
            'image': size(c.image_size),
            'decoder layers': str(c.decoder_layers),
            'precision': c.precision,
            'ms': milliseconds(self.seconds),
            'AP or agreement %': f'{self.accuracy:.1f}',
        }


def tuned(model: nn.Module, config: Config, choice: Choice) -> Detector:
    """A detector that runs as a choice of float32 in PyTorch; all modules are shared.

    Args:
        model (nn.Module): As built from ``config``, with its weights.
        config (Config): Its test pipeline reads images.
        choice (Choice): Schedule, size of images and depth of the decoder.
    """
    config = with_image_size(config, choice.image_size)
    return pytorch_detector(
        with_decoder_layers(model, choice.decoder_layers), config, choice.schedule
    )


def schedules_of(model: nn.Module) -> list[str]:
    """The schedules that a detector has weights for, the most expensive first.

    Raises:
        ValueError: It has no Lite encoder.
    """
    encoder = model.get_submodule(encoder_name(model))
    if not isinstance(encoder, InterleavedEncoder):
        raise ValueError(
            f'{type(model).__name__} has no Lite encoder, so there is nothing to choose; '
            'mmlite convert makes it Lite, with elastic=[...] for several schedules'
        )
    return [str(each) for each in sorted(encoder.schedules, key=lambda each: -each.cost)]


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of a detector."""
    return model.decoder if hasattr(model, 'decoder') else model.panoptic_head.transformer_decoder


def with_decoder_layers(model: nn.Module, count: int) -> nn.Module:
    """A detector with the first layers of its decoder alone; all modules are shared.

    Raises:
        ValueError: It has fewer layers.
    """
    layers = len(decoder_of(model).layers)
    if not 1 <= count <= layers:
        raise ValueError(f'the decoder has {layers} layers; {count} of them cannot be taken')
    model = copy.copy(model)
    model._modules = dict(model._modules)
    name = 'decoder' if hasattr(model, 'decoder') else 'panoptic_head'
    part = model._modules[name] = copy.copy(model._modules[name])
    part._modules = dict(part._modules)
    if name == 'panoptic_head':
        decoder = part._modules['transformer_decoder'] = copy.copy(part.transformer_decoder)
        decoder._modules = {**decoder._modules, 'layers': decoder.layers[:count]}
        decoder.num_layers = part.num_transformer_decoder_layers = count
        return model
    part.layers, part.num_layers = part.layers[:count], count
    head = model._modules['bbox_head'] = copy.copy(model.bbox_head)
    head._modules = dict(head._modules)
    for branches in ('cls_branches', 'reg_branches'):
        kept = list(getattr(head, branches))
        head._modules[branches] = nn.ModuleList([*kept[:count], *kept[layers:]])
    return model


def with_image_size(config: Config, image_size: tuple[int, int]) -> Config:
    """A config whose test images are fitted into (h, w)."""
    config = copy.deepcopy(config)
    for step in config.test_dataloader.dataset.pipeline:
        if type_name(step['type']) in ('Resize', 'FixScaleResize'):
            step['scale'] = image_size[::-1]
    return config


def tune(
    model: nn.Module,
    config: Config,
    runtime: str = 'pytorch',
    *,
    image_sizes: Sequence[tuple[int, int]] = ((800, 1333),),
    decoder_layers: Sequence[int] = (),
    int8: bool = False,
    images: Sequence[np.ndarray] = (),
    dataset: Dataset | None = None,
    rounds: int = 4,
    folder: Path = Path('work_dirs/tune'),
    start: Start = silent,
) -> list[Point]:
    """Time and measure every choice that there is, and give them, the most expensive first.

    ``model`` is a Lite detector with its weights, elastic for several schedules, and ``config`` is
    its config. ``runtime`` is ``'pytorch'``, ``'onnxruntime'`` or ``'openvino'``. Images are fitted
    into ``image_sizes`` (h, w), and ``decoder_layers`` of the decoder are kept, by default all.
    With ``int8`` choices also run in 8 bits, in OpenVINO, calibrated on ``images``, which are as
    ``cv2.imread`` gives them. AP is measured on ``dataset``; without one, accuracy is how many
    detections of the most expensive choice are found on ``images``. Exports go to ``folder``, each
    in a folder of its own.

    Raises:
        ValueError: There is nothing to choose, or nothing to measure accuracy on.
        ImportError: The runtime is missing.
    """
    if not images and dataset is None:
        raise ValueError('accuracy needs images, or annotations with their images')
    if int8 and runtime != 'openvino':
        raise ValueError('8 bits are for OpenVINO; choose --runtime openvino')
    if int8 and not images:
        raise ValueError('8 bits are calibrated on images; give --images')
    if runtime != 'pytorch':
        need_runtime(runtime, int8)
    depths = sorted(set(decoder_layers) or {len(decoder_of(model).layers)}, reverse=True)
    sizes = sorted(image_sizes, key=lambda each: -each[0] * each[1])
    choices = [Choice(s, i, d) for i, d, s in product(sizes, depths, schedules_of(model))]
    choices += [replace(choice, precision='int8') for choice in choices if int8]
    step = start('preparing', len(choices))
    detectors, calls = {}, {}
    for choice in choices:
        if runtime == 'pytorch':
            detectors[choice] = tuned(model, config, choice)
        else:
            detectors[choice] = _exported(model, config, choice, runtime, folder, images)
        calls[choice] = session_call(detectors[choice], choice.image_size)
        step()
    timings = measure(calls, Setting(rounds=rounds, warmup=1), start, 'timing')
    step = start('measuring accuracy', len(choices))
    points, reference = [], None
    for choice, detector in detectors.items():
        if dataset is not None:
            accuracy = coco_ap(detector, dataset.annotations, dataset.images)
        else:
            found = [detector.detect(image) for image in images]
            reference = reference or found
            accuracy = agreement(reference, found)
        points.append(Point(choice, timings[choice].median, accuracy, calls[choice]))
        step()
    return points


def _exported(model, config, choice: Choice, runtime: str, folder: Path, images) -> Detector:
    """The export of a choice, loaded; 8 bits are calibrated on the images."""
    use_schedule(model, choice.schedule)
    model = with_decoder_layers(model, choice.decoder_layers)
    config = with_image_size(config, choice.image_size)
    path = source = export_folder(choice, folder)
    fixed = None
    if choice.precision == 'int8':
        source, fixed = path.with_name(f'{path.name}-source'), choice.image_size
    export_detector(model, source, FORMATS[runtime], config, fixed)
    if fixed:
        quantize(source, path, images)
    return load(path, torch.get_num_threads())


def export_folder(choice: Choice, folder: Path) -> Path:
    """Where the export of a choice lies."""
    return folder / ''.join(c if c.isalnum() else '-' for c in str(choice))


def agreement(wanted: Sequence[Detections], found: Sequence[Detections]) -> float:
    """Percent of the 20 best of each image that others have, by class and an IoU of a half."""
    hits = total = 0
    for theirs, ours in zip(wanted, found):
        best = np.argsort(-theirs.scores, kind='stable')[:20]
        total += len(best)
        boxes = (torch.from_numpy(found.boxes) for found in (theirs, ours))
        overlaps = bbox_overlaps(*boxes).numpy()[best]
        same = theirs.labels[best, None] == ours.labels
        hits += int(((overlaps >= 0.5) & same).any(1).sum())
    return 100.0 * hits / max(total, 1)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that nothing else beats in both time and accuracy, the fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.seconds, -each.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def choose(points: Sequence[Point], budget: float) -> Point:
    """The most accurate point within a budget of seconds.

    Raises:
        ValueError: Nothing is that fast; the message names the nearest.
    """
    fast = [point for point in front(points) if point.seconds <= budget]
    if not fast:
        nearest = min(points, key=lambda each: each.seconds)
        raise ValueError(
            f'nothing runs within {milliseconds(budget)} ms; the nearest is {nearest.choice} with '
            f'{milliseconds(nearest.seconds)} ms'
        )
    return fast[-1]


def write_choice(point: Point, model: nn.Module, config: Config, base: str, folder: Path) -> Path:
    """Write a config and the weights of a choice for PyTorch; returns the config's path."""
    choice = point.choice
    weights, written = folder / 'weights.pth', folder / 'tuned.py'
    kept = with_decoder_layers(model, choice.decoder_layers).state_dict()
    torch.save({'state_dict': kept}, weights)
    sized = with_image_size(config, choice.image_size)
    path, holder, _ = find_holder(config.model)
    at = '.'.join(('model', *path))
    decoder = f'{at}.decoder' if 'decoder' in holder else f'model.{path[0]}.transformer_decoder'
    changes = {
        f'{at}.encoder.schedule': choice.schedule,
        f'{at}.encoder.elastic': list(map(str, schedules_of(model))),
        f'{decoder}.num_layers': choice.decoder_layers,
        'test_dataloader.dataset.pipeline': sized.test_dataloader.dataset.pipeline,
        'load_from': str(weights),
    }
    text = Config()
    text.merge_from_dict(changes)
    head = f'# {choice}: {milliseconds(point.seconds)} ms when it was chosen\n_base_ = {base!r}\n'
    written.write_text(head + text.pretty_text)
    return written


def draw(points: Sequence[Point], path: Path, budget: float | None = None) -> None:
    """Draw time against accuracy, and the front through the points that nothing beats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    best = front(points)
    axes.plot([1e3 * p.seconds for p in points], [p.accuracy for p in points], '.', color='0.6')
    axes.plot([1e3 * p.seconds for p in best], [p.accuracy for p in best], 'o-', color='C0')
    for point in best:
        label = f'{point.choice.schedule}, {size(point.choice.image_size)}'
        where = (1e3 * point.seconds, point.accuracy)
        axes.annotate(label, where, textcoords='offset points', xytext=(5, -10), fontsize=7)
    if budget is not None:
        axes.axvline(1e3 * budget, color='C3', linestyle='--')
    axes.set(xlabel='time of an image, ms', ylabel='AP, or agreement %')
    figure.savefig(path)


def tables(points: Sequence[Point]) -> list[Table]:
    """Points as tables: the best of them, and all."""
    shown = {'What nothing else beats in time and accuracy': front(points)}
    shown['All that was tried'] = points
    return [Table(title, [each.cells() for each in rows]) for title, rows in shown.items()]
