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
from ..export.int8 import coco_ap, import_nncf, quantize
from ..export.pytorch import pytorch_detector
from ..export.runtimes import import_runtime
from ..export.write import export_detector
from ..models import use_schedule
from ..nn import InterleavedEncoder
from ..openmmlab.families import encoder_name, find_holder, type_name
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
    annotated: tuple[Path, Path] | None = None,
    rounds: int = 4,
    folder: Path = Path('work_dirs/tune'),
    start: Start = silent,
) -> list[Point]:
    """Time and measure every choice that there is.

    Args:
        model (nn.Module): A Lite detector with its weights, elastic for several schedules.
        config (Config): Its config.
        runtime (str): ``'pytorch'``, ``'onnxruntime'`` or ``'openvino'``.
        image_sizes (Sequence[tuple[int, int]]): (h, w) that images are fitted into.
        decoder_layers (Sequence[int]): How many layers of the decoder are kept; by default all.
        int8 (bool): Also in 8 bits, in OpenVINO, calibrated on ``images``.
        images (Sequence[np.ndarray]): As ``cv2.imread`` gives them. Without ``annotated``, accuracy
            is how many of the detections of the most expensive choice are found on them.
        annotated (tuple[Path, Path], optional): COCO annotations and the folder of their images.
        rounds (int): Measurements of each.
        folder (Path): Where exports go, each in a folder of its own.
        start (Start): Shows progress.

    Returns:
        list[Point]: In the order of the choices, the most expensive first.

    Raises:
        ValueError: There is nothing to choose, or nothing to measure accuracy on.
        ImportError: The runtime is missing.
    """
    if not images and annotated is None:
        raise ValueError('accuracy needs images, or annotations with their images')
    if int8 and runtime != 'openvino':
        raise ValueError('8 bits are for OpenVINO; choose --runtime openvino')
    if int8 and not images:
        raise ValueError('8 bits are calibrated on images; give --images')
    for package in () if runtime == 'pytorch' else ('onnx', 'onnxscript', runtime):
        import_runtime(package)
    if int8:
        import_nncf()
    depths = sorted(set(decoder_layers) or {len(decoder_of(model).layers)}, reverse=True)
    sizes = sorted(image_sizes, key=lambda each: -each[0] * each[1])
    choices = [Choice(s, i, d) for i, d, s in product(sizes, depths, schedules_of(model))]
    choices += [replace(choice, precision='int8') for choice in choices if int8]
    step = start('preparing', len(choices))
    detectors = {}
    for choice in choices:
        if runtime == 'pytorch':
            detectors[choice] = tuned(model, config, choice)
        else:
            detectors[choice] = _exported(model, config, choice, runtime, folder, images)
        step()
    calls = {choice: _call(detector, choice) for choice, detector in detectors.items()}
    timings = measure(calls, Setting(rounds=rounds, warmup=1), start, 'timing')
    step = start('measuring accuracy', len(choices))
    points, reference = [], None
    for choice, detector in detectors.items():
        if annotated is not None:
            accuracy = coco_ap(detector, *annotated)
        else:
            found = [detector.detect(image) for image in images]
            reference = reference or found
            accuracy = agreement(reference, found)
        points.append(Point(choice, timings[choice].median, accuracy, calls[choice]))
        step()
    return points


def _exported(model, config, choice: Choice, runtime: str, folder: Path, images) -> Detector:
    use_schedule(model, choice.schedule)
    model = with_decoder_layers(model, choice.decoder_layers)
    config = with_image_size(config, choice.image_size)
    path = export_folder(choice, folder)
    format = 'onnx' if runtime == 'onnxruntime' else runtime
    fixed = choice.image_size if choice.precision == 'int8' else None
    source = path.with_name(f'{path.name}-source') if fixed else path
    export_detector(model, source, format, config, fixed)
    if fixed:
        quantize(source, path, images)
    return load(path, torch.get_num_threads())


def export_folder(choice: Choice, folder: Path) -> Path:
    """Where the export of a choice lies."""
    return folder / ''.join(c if c.isalnum() else '-' for c in str(choice))


def _call(detector: Detector, choice: Choice) -> Call:
    image = np.random.default_rng(0).uniform(0, 255, (3, *choice.image_size)).astype(np.float32)
    arguments = detector.arguments([image], 1)
    return lambda index: detector.session(*arguments)


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
    weights = folder / 'weights.pth'
    kept = with_decoder_layers(model, choice.decoder_layers).state_dict()
    torch.save({'state_dict': kept}, weights)
    path, holder, _ = find_holder(config.model)
    changes: dict = {'encoder': {'schedule': choice.schedule}}
    elastic = list(map(str, schedules_of(model)))
    if len(elastic) > 1:
        changes['encoder']['elastic'] = elastic
    if 'decoder' in holder:
        changes['decoder'] = {'num_layers': choice.decoder_layers}
    for name in reversed(path):
        changes = {name: changes}
    if 'decoder' not in holder:
        changes[path[0]]['transformer_decoder'] = {'num_layers': choice.decoder_layers}
    pipeline = with_image_size(config, choice.image_size).test_dataloader.dataset.pipeline
    loader = {'dataset': {'pipeline': [step.to_dict() for step in pipeline]}}
    lines = [
        f'# {choice}: {milliseconds(point.seconds)} ms when it was chosen',
        f'_base_ = {base!r}',
        f'model = {changes!r}',
        f'test_dataloader = {loader!r}',
        f'load_from = {str(weights)!r}',
    ]
    written = folder / 'tuned.py'
    written.write_text('\n'.join(lines) + '\n')
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


def table(points: Sequence[Point], title: str) -> Table:
    """Points as a table."""
    return Table(title, [point.cells() for point in points])
