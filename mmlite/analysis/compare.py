"""A baseline detector and its variants: cost, time, memory and accuracy, in one run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from mmdet.datasets import CocoDataset
from torch import nn

from ..openmmlab.build import build_detector, load_config
from ..openmmlab.families import encoder_name
from .accuracy import Dataset, evaluate
from .complexity import Complexity, count_detector
from .inputs import image_batch
from .latency import Call, Ratio, Timing, speedup
from .memory import peak_memory
from .modes import EAGER, in_mode, label, why_not
from .profile import profile_stages
from .published import DetectorSpec
from .report import Start, size
from .setting import Setting


@dataclass
class Result:
    """What one detector costs, by batch size where it depends on that; memory in bytes."""

    detector: DetectorSpec
    complexity: Complexity  # at the setting's image size
    flops_by_size: dict[str, int]
    mode: str = EAGER  # of the encoder
    latency: dict[int, Timing] = field(default_factory=dict)  # images on the device to boxes
    faster: dict[int, Ratio] = field(default_factory=dict)  # than the baseline
    memory: dict[int, int | None] = field(default_factory=dict)  # beyond weights and images
    stages: dict[str, float] = field(default_factory=dict)  # seconds, first batch size
    training: Timing | None = None  # forward, losses and backward
    training_faster: Ratio | None = None
    training_memory: int | None = None  # gradients included
    accuracy: dict[str, float] | None = None  # COCO's metrics in percent

    @property
    def name(self) -> str:
        return label(self.detector.name, self.mode)

    def as_json(self) -> dict:
        content = asdict(self)
        throughput = {batch: batch / timing.median for batch, timing in self.latency.items()}
        return {'name': self.name, **content.pop('detector'), **content, 'throughput': throughput}


def compare(
    detectors: Sequence[DetectorSpec],
    setting: Setting,
    dataset: Dataset | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    start: Start = lambda text, total: lambda: None,
    modes: Sequence[str] = (EAGER,),
) -> list[Result]:
    """Compare detectors with the first of them, the baseline.

    Everything is read, built and counted before anything is timed, so bad input costs no work.

    Args:
        detectors (Sequence[DetectorSpec]): The baseline, then its variants.
        setting (Setting): What they are measured on.
        dataset (Dataset, optional): Where to measure the accuracy of those with a checkpoint.
        sizes (Sequence[tuple[int, int]]): Image sizes to count FLOPs at, beside the setting's;
            those too small for a detector's queries are left out.
        start (Start): Shows progress.
        modes (Sequence[str]): How the encoders run, of :data:`~mmlite.analysis.modes.MODES`.
            Every detector is measured in each that its encoder can run in, the baseline eagerly
            in any case. Accuracy is measured once.

    Raises:
        FileNotFoundError: A config, checkpoint or annotation file is missing.
        ValueError: A config cannot be built, a checkpoint does not fit, a detector does not run
            on this image size, or the data set has no annotations.
    """
    if dataset is not None:
        dataset.check()
    configs = [load_config(detector.config) for detector in detectors]
    step = start('building', len(detectors))
    models = []
    for detector, config in zip(detectors, configs):
        models.append(build_detector(config, detector.checkpoint, setting.device))
        step()

    sizes = sorted({*sizes, setting.image_size})
    step = start('counting', len(models) * len(sizes))
    results = []
    for detector, model in zip(detectors, models):
        counts = {}
        for image_size in sizes:
            try:
                counts[image_size] = _count(detector, model, image_size)
            except ValueError:
                if image_size == setting.image_size:
                    raise
            step()
        flops = {size(image_size): count.flops for image_size, count in counts.items()}
        results.append(Result(detector, counts[setting.image_size], flops))

    if setting.rounds:
        results, models = _in_modes(results, models, modes, setting.device)
        for batch_size in setting.batch_sizes:
            _measure_inference(results, models, batch_size, setting, start)
        if setting.training:
            _measure_training(results, models, setting, start)
    if dataset is not None:
        tested = [i for i, detector in enumerate(detectors) if detector.checkpoint]
        step = start('evaluating', len(tested))
        for i in tested:
            accuracy = evaluate(configs[i], detectors[i].checkpoint, dataset, setting.device)
            for result in results:
                if result.detector is detectors[i]:
                    result.accuracy = accuracy
            step()
    return results


def _in_modes(
    results: list[Result], models: list[nn.Module], modes: Sequence[str], device: str
) -> tuple[list[Result], list[nn.Module]]:
    """Results and models of all modes; the baseline as it stands comes first."""
    all_results, all_models = [], []
    for index, (result, model) in enumerate(zip(results, models)):
        for mode in dict.fromkeys(modes if index else [EAGER, *modes]):
            variant = model if mode == EAGER else _with_encoder_in(model, mode, device)
            if variant is not None:
                all_results.append(
                    Result(result.detector, result.complexity, result.flops_by_size, mode)
                )
                all_models.append(variant)
    return all_results, all_models


def _with_encoder_in(model: nn.Module, mode: str, device: str) -> nn.Module | None:
    """A copy of the model whose encoder runs in another mode; None where it cannot."""
    try:
        name = encoder_name(model)
    except ValueError:
        return None
    if why_not(model.get_submodule(name), mode, device):
        return None
    variant = copy.deepcopy(model)
    holder, _, attribute = name.rpartition('.')
    setattr(variant.get_submodule(holder), attribute, in_mode(variant.get_submodule(name), mode))
    return variant


def _count(detector: DetectorSpec, model: nn.Module, image_size: tuple[int, int]) -> Complexity:
    try:
        return count_detector(model, image_size)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(
            f'{detector.config} does not run on an image of {size(image_size)}: {reason}'
        ) from error


def _measure_inference(
    results: list[Result], models: list[nn.Module], batch_size: int, setting: Setting, start: Start
) -> None:
    calls = [_inference(model, batch_size, setting) for model in models]
    what = f'inference, batch {batch_size}'
    timings = setting.measure(dict(enumerate(calls)), start, what)
    step = start(f'memory and stages, batch {batch_size}', len(calls))
    for index, (result, model, call) in enumerate(zip(results, models, calls)):
        result.latency[batch_size] = timings[index]
        result.faster[batch_size] = speedup(timings[0], timings[index])
        result.memory[batch_size] = peak_memory(partial(call, 0), setting.device)
        if batch_size == setting.batch_size:
            result.stages = profile_stages(
                model, call, repeats=min(3, setting.rounds), device=setting.device
            )
        step()


def _measure_training(
    results: list[Result], models: list[nn.Module], setting: Setting, start: Start
) -> None:
    calls = [_training_step(model, setting) for model in models]
    timings = setting.measure(dict(enumerate(calls)), start, 'training step')
    for index, (result, model, call) in enumerate(zip(results, models, calls)):
        result.training = timings[index]
        result.training_faster = speedup(timings[0], timings[index])
        model.zero_grad(set_to_none=True)
        result.training_memory = peak_memory(partial(call, 0), setting.device)
        model.zero_grad(set_to_none=True)
        model.eval()


def _inference(model: nn.Module, batch_size: int, setting: Setting) -> Call:
    images, samples = image_batch(batch_size, setting.image_size, device=setting.device)

    def call(index: int) -> object:
        model.eval()
        with torch.no_grad(), setting.autocast():
            return model.predict(images, samples)

    return call


def _num_classes(model: nn.Module) -> int:
    """Classes of objects: of the text, of the head, or of a segmenter's things."""
    if hasattr(model, 'language_model'):
        return len(CocoDataset.METAINFO['classes'])  # see image_batch
    head = getattr(model, 'bbox_head', None)
    return head.num_classes if head is not None else getattr(model, 'num_things_classes', 80)


def _training_step(model: nn.Module, setting: Setting) -> Call:
    images, samples = image_batch(
        setting.batch_size,
        setting.image_size,
        num_classes=_num_classes(model),
        device=setting.device,
    )

    def call(index: int) -> object:
        model.train()
        model.zero_grad(set_to_none=True)
        with setting.autocast():
            losses = model.loss(images, samples)
        loss, _ = model.parse_losses(losses)
        loss.backward()
        return loss

    return call
