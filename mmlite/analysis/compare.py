"""A baseline detector and its variants: cost, time, memory and accuracy, in one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from .accuracy import Dataset, evaluate
from .complexity import Complexity, count_detector
from .inputs import image_batch
from .latency import Ratio, Timing, measure, measurements, speedup
from .memory import peak_memory
from .models import build_detector, load_config
from .profile import profile_stages
from .published import Published

Start = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class Subject:
    """A detector to compare.

    Attributes:
        config (str): As for :func:`~mmlite.analysis.models.load_config`.
        checkpoint (str | None): Its weights; random ones otherwise.
        published (Published | None): What a paper reports for it.
    """

    config: str
    checkpoint: str | None = None
    published: Published | None = None

    @property
    def name(self) -> str:
        if self.published:
            return f'{self.published.model}, {self.published.backbone}'
        stem = Path(self.config.partition('::')[2] or self.config).stem
        # What a config's name says about training does not matter here.
        return re.sub(r'(_\d+xb\d+-\d+e)?(_coco)?$', '', stem)


@dataclass(frozen=True)
class Setting:
    """How to compare.

    Attributes:
        image_size (tuple[int, int]): Height and width in pixels.
        batch_sizes (tuple[int, ...]): Each is measured.
        device (str): Where to run.
        dtype (str): ``float32``, or what autocast runs in.
        rounds (int): Measurements of each detector; 0 to count only and measure nothing.
        warmup (int): Calls before.
        training (bool): Also measure a training step, at the first batch size.
        sizes (tuple[tuple[int, int], ...]): Image sizes to count FLOPs at, beside ``image_size``;
            those too small for a detector's queries are left out.
    """

    image_size: tuple[int, int] = (800, 1333)
    batch_sizes: tuple[int, ...] = (1,)
    device: str = 'cpu'
    dtype: str = 'float32'
    rounds: int = 10
    warmup: int = 2
    training: bool = False
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass
class Result:
    """What one detector costs.

    Attributes:
        subject (Subject): Which detector.
        complexity (Complexity): Counts at the image size.
        flops_by_size (dict): Image size -> FLOPs.
        latency (dict[int, Timing]): Batch size -> seconds a batch, from images on the device to
            boxes.
        faster (dict[int, Ratio]): Batch size -> how many times faster than the baseline.
        memory (dict[int, int | None]): Batch size -> peak bytes beyond weights and images.
        stages (dict[str, float]): Seconds of each stage and encoder layer, first batch size.
        training (Timing | None): Seconds of forward, losses and backward.
        training_faster (Ratio | None): How many times faster than the baseline's.
        training_memory (int | None): Peak bytes beyond weights and images, gradients included.
        accuracy (dict[str, float] | None): COCO's metrics in percent.
    """

    subject: Subject
    complexity: Complexity
    flops_by_size: dict[tuple[int, int], int]
    latency: dict[int, Timing] = field(default_factory=dict)
    faster: dict[int, Ratio] = field(default_factory=dict)
    memory: dict[int, int | None] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    training: Timing | None = None
    training_faster: Ratio | None = None
    training_memory: int | None = None
    accuracy: dict[str, float] | None = None

    @property
    def name(self) -> str:
        return self.subject.name

    def as_json(self) -> dict:
        return {
            'name': self.name,
            'config': self.subject.config,
            'checkpoint': self.subject.checkpoint,
            'published': self.subject.published and self.subject.published._asdict(),
            'complexity': asdict(self.complexity),
            'flops_by_size': {'x'.join(map(str, s)): f for s, f in self.flops_by_size.items()},
            'latency': {batch: timing.as_json() for batch, timing in self.latency.items()},
            'faster': {batch: asdict(ratio) for batch, ratio in self.faster.items()},
            'throughput': {batch: batch / t.median for batch, t in self.latency.items()},
            'memory': self.memory,
            'stages': self.stages,
            'training': self.training and self.training.as_json(),
            'training_faster': self.training_faster and asdict(self.training_faster),
            'training_memory': self.training_memory,
            'accuracy': self.accuracy,
        }


def compare(
    subjects: Sequence[Subject],
    setting: Setting,
    dataset: Dataset | None = None,
    start: Start = lambda text, total: lambda: None,
) -> list[Result]:
    """Compare detectors with the first of them, the baseline.

    Everything is read, built and counted before anything is timed, so bad input costs no work.

    Args:
        subjects (Sequence[Subject]): The baseline, then its variants.
        setting (Setting): How.
        dataset (Dataset, optional): Where to measure the accuracy of those with a checkpoint.
        start (Callable): Called with a text and a number of steps; returns what to call after
            each step.

    Returns:
        list[Result]: One for each subject, in order.

    Raises:
        FileNotFoundError: A config, checkpoint or annotation file is missing.
        ValueError: A config cannot be built, a checkpoint does not fit, a detector does not run
            on this image size, or the data set has no annotations.
    """
    if dataset is not None:
        dataset.check()
    configs = [load_config(subject.config) for subject in subjects]
    step = start('building', len(subjects))
    models = []
    for subject, config in zip(subjects, configs):
        models.append(build_detector(config, subject.checkpoint, setting.device))
        step()

    sizes = sorted({*setting.sizes, setting.image_size})
    step = start('counting', len(models) * len(sizes))
    results = []
    for subject, model in zip(subjects, models):
        counts = {}
        for size in sizes:
            try:
                counts[size] = _count(subject, model, size)
            except ValueError:
                if size == setting.image_size:
                    raise
            step()
        flops = {size: count.flops for size, count in counts.items()}
        results.append(Result(subject, counts[setting.image_size], flops))

    if setting.rounds:
        for batch_size in setting.batch_sizes:
            _measure_inference(results, models, batch_size, setting, start)
        if setting.training:
            _measure_training(results, models, setting, start)
    if dataset is not None:
        with_weights = [index for index, subject in enumerate(subjects) if subject.checkpoint]
        step = start('evaluating', len(with_weights))
        for index in with_weights:
            results[index].accuracy = evaluate(
                configs[index], subjects[index].checkpoint, dataset, setting.device
            )
            step()
    return results


def _count(subject: Subject, model: nn.Module, size: tuple[int, int]) -> Complexity:
    try:
        return count_detector(model, size)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(
            f'{subject.config} does not run on an image of {size[0]}x{size[1]}: {reason}'
        ) from error


def _measure_inference(
    results: list[Result], models: list[nn.Module], batch_size: int, setting: Setting, start: Start
) -> None:
    calls = [_inference(model, batch_size, setting) for model in models]
    timings = measure(
        dict(enumerate(calls)),
        rounds=setting.rounds,
        warmup=setting.warmup,
        device=setting.device,
        on_step=start(f'inference, batch {batch_size}', measurements(len(calls), setting.rounds)),
    )
    step = start(f'memory and stages, batch {batch_size}', len(calls))
    for index, (result, model, call) in enumerate(zip(results, models, calls)):
        result.latency[batch_size] = timings[index]
        result.faster[batch_size] = speedup(timings[0], timings[index])
        result.memory[batch_size] = peak_memory(lambda call=call: call(0), setting.device)
        if batch_size == setting.batch_sizes[0]:
            result.stages = profile_stages(
                model, call, repeats=min(3, setting.rounds), device=setting.device
            )
        step()


def _measure_training(
    results: list[Result], models: list[nn.Module], setting: Setting, start: Start
) -> None:
    calls = [_training_step(model, setting) for model in models]
    timings = measure(
        dict(enumerate(calls)),
        rounds=setting.rounds,
        warmup=setting.warmup,
        device=setting.device,
        on_step=start('training step', measurements(len(calls), setting.rounds)),
    )
    for index, (result, model, call) in enumerate(zip(results, models, calls)):
        result.training = timings[index]
        result.training_faster = speedup(timings[0], timings[index])
        model.zero_grad(set_to_none=True)
        result.training_memory = peak_memory(lambda call=call: call(0), setting.device)
        model.zero_grad(set_to_none=True)
        model.eval()


def _autocast(setting: Setting) -> torch.autocast:
    return torch.autocast(
        torch.device(setting.device).type,
        dtype=getattr(torch, setting.dtype),
        enabled=setting.dtype != 'float32',
    )


def _inference(model: nn.Module, batch_size: int, setting: Setting) -> Callable[[int], object]:
    images, samples = image_batch(batch_size, setting.image_size, device=setting.device)

    def call(index: int) -> object:
        model.eval()
        with torch.no_grad(), _autocast(setting):
            return model.predict(images, samples)

    return call


def _training_step(model: nn.Module, setting: Setting) -> Callable[[int], object]:
    images, samples = image_batch(
        setting.batch_sizes[0],
        setting.image_size,
        num_classes=getattr(getattr(model, 'bbox_head', None), 'num_classes', 80),
        device=setting.device,
    )

    def call(index: int) -> object:
        model.train()
        model.zero_grad(set_to_none=True)
        with _autocast(setting):
            losses = model.loss(images, samples)
        loss, _ = model.parse_losses(losses)
        loss.backward()
        return loss

    return call
