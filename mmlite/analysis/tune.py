"""Which schedule, image size and depth of the decoder are the most accurate within a time.

One set of elastic weights is a detector for each of its schedules. Every choice is timed on this
machine, in the runtime that it is for, in turns with all others, and measured on images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from torch import nn

from ..export.detector import Detections, Detector, load
from ..export.int8 import quantize
from ..export.pytorch import pytorch_detector
from ..export.write import export_detector
from ..models import use_schedule
from ..nn import InterleavedEncoder
from ..openmmlab.families import encoder_name, type_name
from .accuracy import Dataset
from .contestants import FORMATS, need_runtime, session_call
from .report import Table, milliseconds, size
from .timing import Call, Contestant, Setting, Start, silent, take_turns


@dataclass(eq=False)
class Choice(Contestant):
    """One way to run a detector, what it costs and what it finds."""

    schedule: str
    image_size: tuple[int, int]  # (h, w) that images are fitted into
    decoder_layers: int
    precision: str = 'float32'
    accuracy: float = math.nan  # AP in percent, or agreement in percent where there are no labels
    detector: Detector | None = None

    def __str__(self) -> str:
        image = f'{self.schedule}, {size(self.image_size)}'
        return f'{image}, {self.decoder_layers} decoder layers, {self.precision}'

    @property
    def seconds(self) -> float:
        """Median of an image."""
        return self.timings['inference'][1].median

    def label(self) -> dict[str, object]:
        return {
            'schedule': self.schedule,
            'image': size(self.image_size),
            'decoder layers': self.decoder_layers,
            'precision': self.precision,
            'ms': milliseconds(self.seconds),
            'AP or agreement %': f'{self.accuracy:.1f}',
        }

    def call(self, part: str, setting: Setting, batch_size: int) -> Call:
        return session_call(self.detector, self.image_size)

    def as_json(self) -> dict:
        names = ['schedule', 'image_size', 'decoder_layers', 'precision', 'seconds', 'accuracy']
        return {name: getattr(self, name) for name in names}

    def folder(self, parent: Path) -> Path:
        """Where its export lies."""
        return parent / ''.join(c if c.isalnum() else '-' for c in str(self))


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


def decoder_at(model: nn.Module) -> str:
    """Name of the decoder in a detector."""
    return 'decoder' if hasattr(model, 'decoder') else 'panoptic_head.transformer_decoder'


def with_decoder_layers(model: nn.Module, count: int) -> nn.Module:
    """A copy of a detector with the first layers of its decoder alone; itself where that is all.

    Raises:
        ValueError: It has fewer layers.
    """
    at = decoder_at(model)
    layers = len(model.get_submodule(at).layers)
    if not 1 <= count <= layers:
        raise ValueError(f'the decoder has {layers} layers; {count} of them cannot be taken')
    if count == layers:
        return model
    model = copy.deepcopy(model)
    decoder = model.get_submodule(at)
    decoder.layers, decoder.num_layers = decoder.layers[:count], count
    if hasattr(model, 'bbox_head'):
        for branches in (model.bbox_head.cls_branches, model.bbox_head.reg_branches):
            del branches[count:layers]  # behind the layers': that of the first stage
    else:
        model.panoptic_head.num_transformer_decoder_layers = count
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
) -> list[Choice]:
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
    layers = len(model.get_submodule(decoder_at(model)).layers)
    depths = sorted(set(decoder_layers) or {layers}, reverse=True)
    sizes = sorted(image_sizes, key=lambda each: -each[0] * each[1])
    precisions = ('float32', 'int8') if int8 else ('float32',)
    every = product(precisions, sizes, depths, schedules_of(model))
    choices = [Choice(schedule, *where, precision) for precision, *where, schedule in every]
    cut = {count: with_decoder_layers(model, count) for count in depths}
    step = start('preparing', len(choices))
    for each in choices:
        given = cut[each.decoder_layers], with_image_size(config, each.image_size)
        if runtime == 'pytorch':
            each.detector = pytorch_detector(*given, each.schedule)
        else:
            each.detector = _exported(*given, each, runtime, folder, images)
        step()
    take_turns(choices, Setting(rounds=rounds, warmup=1), start)
    step, reference = start('measuring accuracy', len(choices)), None
    for each in choices:
        if dataset is not None:
            each.accuracy = dataset.evaluate(each.detector)['mAP']
        else:
            found = [each.detector.detect(image) for image in images]
            reference = reference or found
            each.accuracy = agreement(reference, found)
        step()
    return choices


def _exported(model, config, choice: Choice, runtime: str, folder: Path, images) -> Detector:
    """The export of a choice, loaded; 8 bits are calibrated on the images."""
    use_schedule(model, choice.schedule)
    path = source = choice.folder(folder)
    fixed = None
    if choice.precision == 'int8':
        source, fixed = path.with_name(f'{path.name}-source'), choice.image_size
    export_detector(model, source, FORMATS[runtime], config, fixed)
    if fixed:
        quantize(source, path, images)
    return load(path, torch.get_num_threads())


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


def front(choices: Sequence[Choice]) -> list[Choice]:
    """Those that nothing else beats in both time and accuracy, the fastest first."""
    best: list[Choice] = []
    for each in sorted(choices, key=lambda each: (each.seconds, -each.accuracy)):
        if not best or each.accuracy > best[-1].accuracy:
            best.append(each)
    return best


def choose(choices: Sequence[Choice], budget: float) -> Choice:
    """The most accurate choice within a budget of seconds.

    Raises:
        ValueError: Nothing is that fast; the message names the nearest.
    """
    best = front(choices)
    fast = [each for each in best if each.seconds <= budget]
    if not fast:
        raise ValueError(
            f'nothing runs within {milliseconds(budget)} ms; the nearest is {best[0]} with '
            f'{milliseconds(best[0].seconds)} ms'
        )
    return fast[-1]


def write_choice(choice: Choice, model: nn.Module, config: Config, base: str, folder: Path) -> Path:
    """Write a config and the weights of a choice for PyTorch; returns the config's path."""
    weights, written = folder / 'weights.pth', folder / 'tuned.py'
    kept = with_decoder_layers(model, choice.decoder_layers).state_dict()
    torch.save({'state_dict': kept}, weights)
    sized = with_image_size(config, choice.image_size)
    encoder = f'model.{encoder_name(model)}'  # as in the config
    changes = {
        f'{encoder}.schedule': choice.schedule,
        f'{encoder}.elastic': schedules_of(model),
        f'model.{decoder_at(model)}.num_layers': choice.decoder_layers,
        'test_dataloader.dataset.pipeline': sized.test_dataloader.dataset.pipeline,
        'load_from': str(weights),
    }
    text = Config()
    text.merge_from_dict(changes)
    head = f'# {choice}: {milliseconds(choice.seconds)} ms when it was chosen\n_base_ = {base!r}\n'
    written.write_text(head + text.pretty_text)
    return written


def draw(choices: Sequence[Choice], path: Path, budget: float | None = None) -> None:
    """Draw time against accuracy, and the front through the choices that nothing beats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    for shown, look in ((choices, {'color': '0.6', 'ls': ''}), (front(choices), {'color': 'C0'})):
        times = [1e3 * each.seconds for each in shown]
        axes.plot(times, [each.accuracy for each in shown], marker='o', **look)
    for each in front(choices):
        label = f'{each.schedule}, {size(each.image_size)}'
        where = (1e3 * each.seconds, each.accuracy)
        axes.annotate(label, where, textcoords='offset points', xytext=(5, -10), fontsize=7)
    if budget is not None:
        axes.axvline(1e3 * budget, color='C3', linestyle='--')
    axes.set(xlabel='time of an image, ms', ylabel='AP, or agreement %')
    figure.savefig(path)


def tables(choices: Sequence[Choice]) -> list[Table]:
    """Choices as tables: the best of them, and all."""
    shown = {'What nothing else beats in time and accuracy': front(choices)}
    shown['All that was tried'] = choices
    return [Table(title, [each.label() for each in rows]) for title, rows in shown.items()]
