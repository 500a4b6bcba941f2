"""Models against their baseline: cost, time, memory and accuracy, in one run.

A :class:`Contestant` is a model as it runs somewhere. Those of MMDetection are in
:mod:`.contestants`, those of transformers in :mod:`.huggingface`, exports in :mod:`.exported`. All
of them are measured by :func:`compare`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..export.inference import optimize
from ..nn import InterleavedEncoder
from ..openmmlab.verbs import fuse
from .accuracy import Dataset, evaluate
from .complexity import Complexity, count_model
from .profile import profile_stages
from .published import Published
from .report import size
from .timing import Call, Ratio, Setting, Start, Timing, measure, peak_memory, silent, speedup

PYTORCH, ONNX, OPENVINO = RUNTIMES = ('pytorch', 'onnxruntime', 'openvino')
# How a model runs in PyTorch: as it is, its encoder compiled or as CUDA graphs, its standard
# deformable attention on our operators, optimised for prediction.
MODES = ('eager', 'compiled', 'graph', 'fused', 'optimized')
EAGER, COMPILED, GRAPH, FUSED, OPTIMIZED = MODES


class Contestant:
    """A model as it runs somewhere, with the name that tables call it by.

    ``encoder_at`` is the name of its multi-scale encoder in it, '' where it is one itself.
    ``checkpoint`` is the file of its weights if they are trained.
    """

    runtime = PYTORCH
    form = EAGER
    published: Published | None = None

    def __init__(
        self, name: str, model: nn.Module, encoder_at: str | None, checkpoint: str | None = None
    ) -> None:
        self.name = name
        self.model = model
        self.encoder_at = encoder_at
        self.checkpoint = checkpoint
        self.costs: dict[tuple[int, int], Complexity] = {}  # by image size
        self.result: Result  # filled by compare()

    @property
    def title(self) -> str:
        words = [self.runtime] * (self.runtime != PYTORCH) + [self.form] * (self.form != EAGER)
        return ', '.join([self.name, *words])

    fuse = staticmethod(fuse)  # that of the model's framework

    def arguments(self, image_size: tuple[int, int], batch_size: int, device: str) -> dict:
        """Keyword arguments for a prediction by the model."""
        raise NotImplementedError

    def loss(self, arguments: dict) -> Tensor:
        """What a training step minimises, of these arguments for a prediction."""
        raise ValueError(f'{self.name} cannot be trained here; leave out --train')

    def outputs(self, prediction: Any) -> list[Tensor]:
        """Tensors of a prediction that a change of form should not change, if there are any."""
        return []

    def count(self, image_size: tuple[int, int]) -> Complexity:
        """What one image costs."""
        device = str(next(self.model.parameters()).device)
        arguments = self.arguments(image_size, 1, device)
        return count_model(self.model, image_size, arguments, self.encoder_at)

    def inference(self, setting: Setting, batch_size: int) -> Call:
        """From images to predictions."""
        arguments = self.arguments(setting.image_size, batch_size, setting.device)
        return _prediction(self.model, setting, **arguments)

    def encoder(self, setting: Setting) -> Call:
        """The encoder alone, on what it gets in :meth:`inference`."""
        caught: dict = {}
        encoder = self.model.get_submodule(self.encoder_at)
        hook = encoder.register_forward_pre_hook(
            lambda module, args, kwargs: caught.update(args=args, **kwargs), with_kwargs=True
        )
        with hook:
            self.inference(setting, setting.batch_size)(0)
        return _prediction(encoder, setting, *caught.pop('args'), **caught)

    def training(self, setting: Setting) -> Call:
        """A training step: forward, losses and backward."""
        arguments = self.arguments(setting.image_size, setting.batch_size, setting.device)

        def call(index: int) -> None:
            self.model.train()
            self.model.zero_grad(set_to_none=True)
            with setting.autocast():
                loss = self.loss(arguments)
            loss.backward()

        return call

    def stages(self, call: Call, setting: Setting) -> dict[str, float]:
        """Seconds by stage of :meth:`inference`; none where they cannot be had."""
        repeats = min(3, setting.rounds)
        return profile_stages(self.model, call, self.encoder_at, repeats, setting.device)

    def in_form(self, form: str, device: str) -> Contestant:
        """The same in another of :data:`MODES`; itself in eager mode.

        Raises:
            ValueError: It does not run so; the message says why.
        """
        if form == EAGER:
            return self
        other = copy.copy(self)
        other.form, other.model = form, copy.deepcopy(self.model)
        if form in (FUSED, OPTIMIZED):
            (self.fuse if form == FUSED else optimize)(other.model)
            return other
        if self.encoder_at is None:
            raise ValueError('it has no multi-scale encoder')
        encoder = other.model.get_submodule(self.encoder_at)
        if form == COMPILED:
            encoder = torch.compile(encoder)
        elif torch.device(device).type != 'cuda':
            raise ValueError(f'graphs are for CUDA devices, and this is {device}')
        elif not isinstance(encoder, InterleavedEncoder):
            raise ValueError('it reads values back from the device, which a graph cannot hold')
        else:
            encoder.replay_graphs()
        holder, _, attribute = self.encoder_at.rpartition('.')
        if attribute:
            setattr(other.model.get_submodule(holder), attribute, encoder)
        else:
            other.model = encoder
        return other


def _prediction(module: nn.Module, setting: Setting, *args, **kwargs) -> Call:
    def call(index: int) -> object:
        module.eval()
        with torch.no_grad(), setting.autocast():
            return module(*args, **kwargs)

    return call


@dataclass
class Result:
    """What one contestant costs, by batch size where it depends on that; memory in bytes."""

    name: str
    runtime: str
    form: str
    complexity: Complexity  # at the setting's image size
    flops_by_size: dict[str, int]
    published: Published | None = None
    latency: dict[int, Timing] = field(default_factory=dict)  # images on the device to boxes
    memory: dict[int, int | None] = field(default_factory=dict)  # beyond weights and images
    stages: dict[str, float] = field(default_factory=dict)  # seconds, first batch size
    encoder: Timing | None = None  # alone
    training: Timing | None = None  # forward, losses and backward
    training_memory: int | None = None  # gradients included
    accuracy: dict[str, float] | None = None  # COCO's metrics in percent
    difference: float | None = None  # of the outputs from the baseline's, at most, if to be none
    baseline: Result | None = field(default=None, repr=False)

    def faster(self, batch_size: int, than: Result | None = None) -> Ratio:
        """How many times faster inference is than that of the baseline, or of another."""
        than = than or self.baseline or self
        return speedup(than.latency[batch_size], self.latency[batch_size])

    def as_json(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != 'baseline'}
        content['faster'] = {batch: self.faster(batch) for batch in self.latency}
        content['throughput'] = {b: b / timing.median for b, timing in self.latency.items()}
        return content


def compare(
    contestants: Sequence[Contestant],
    setting: Setting,
    *,
    modes: Sequence[str] = (EAGER,),
    exported: Sequence[Contestant] = (),
    parts: Sequence[str] = ('detector',),
    sizes: Sequence[tuple[int, int]] = (),
    dataset: Dataset | None = None,
    start: Start = silent,
) -> tuple[list[Result], list[str]]:
    """Measure contestants against the first of them, the baseline.

    All are counted before anything is timed, so bad input costs no work.

    Args:
        contestants (Sequence[Contestant]): The baseline, then its variants.
        setting (Setting): What they are measured on.
        modes (Sequence[str]): Of :data:`MODES`. Each contestant is measured in all that it can run
            in, the baseline eagerly in any case.
        exported (Sequence[Contestant]): What is measured in the same rounds, and not counted.
        parts (Sequence[str]): ``detector`` for the whole model, ``encoder`` for that alone.
        sizes (Sequence[tuple[int, int]]): Image sizes to count FLOPs at, beside the setting's;
            those too small for a detector's queries are left out.
        dataset (Dataset, optional): Where to measure the accuracy of those with a checkpoint.
        start (Start): Shows progress.

    Returns:
        tuple[list[Result], list[str]]: The results, and sentences about what was not measured.

    Raises:
        FileNotFoundError: An annotation file is missing.
        ValueError: A detector does not run on this image size, or the data set has no annotations.
    """
    if dataset is not None:
        dataset.check()
    sizes = sorted({*sizes, setting.image_size})
    step = start('counting', len(contestants) * len(sizes))
    for contestant in contestants:
        for image_size in sizes:
            try:
                contestant.costs[image_size] = contestant.count(image_size)
            except ValueError:
                if image_size == setting.image_size:
                    raise
            step()
    running, notes = _in_modes(contestants, modes if setting.rounds else [EAGER], setting.device)
    everyone = [*running, *exported]
    for each in everyone:
        each.result = Result(
            each.title,
            each.runtime,
            each.form,
            each.costs[setting.image_size],
            {size(image_size): cost.flops for image_size, cost in each.costs.items()},
            each.published,
        )
        each.result.baseline = everyone[0].result
    if setting.rounds:
        if 'detector' in parts:
            for batch_size in setting.batch_sizes:
                _measure_inference(everyone, batch_size, setting, start)
        if 'encoder' in parts:
            calls = {
                each: each.encoder(setting) for each in everyone if each.encoder_at is not None
            }
            for each, timing in measure(calls, setting, start, 'encoder').items():
                each.result.encoder = timing
        if setting.training:
            _measure_training(everyone, setting, start)
    if dataset is not None:
        tested = {c.name: c for c in running if c.checkpoint}
        step = start('evaluating', len(tested))
        for name, one in tested.items():
            accuracy = evaluate(one.model.cfg, one.checkpoint, dataset, setting.device)
            for each in everyone:
                if each.name == name:
                    each.result.accuracy = accuracy
            step()
    return [each.result for each in everyone], notes


def _in_modes(
    contestants: Sequence[Contestant], modes: Sequence[str], device: str
) -> tuple[list[Contestant], list[str]]:
    found, notes = [], []
    for index, contestant in enumerate(contestants):
        for mode in dict.fromkeys(modes if index else [EAGER, *modes]):
            try:
                found.append(contestant.in_form(mode, device))
            except ValueError as error:
                notes.append(f'Not measured: {contestant.name}, {mode}: {error}.')
    return found, notes


def _measure_inference(
    everyone: Sequence[Contestant], batch_size: int, setting: Setting, start: Start
) -> None:
    calls = {each: each.inference(setting, batch_size) for each in everyone}
    timings = measure(calls, setting, start, f'inference, batch {batch_size}')
    baseline = everyone[0]
    expected = baseline.outputs(calls[baseline](0))
    step = start(f'memory and stages, batch {batch_size}', len(everyone))
    for each in everyone:
        call = calls.pop(each)  # a session of a runtime holds gigabytes
        each.result.latency[batch_size] = timings[each]
        each.result.memory[batch_size] = peak_memory(call, setting.device)
        if expected and each.form == FUSED:
            # Equal infinities, which Grounding DINO has behind the text, differ by none.
            each.result.difference = max(
                torch.where(ours == theirs, 0.0, ours - theirs).abs().max().item()
                for ours, theirs in zip(each.outputs(call(0)), expected)
            )
        if batch_size == setting.batch_size:
            each.result.stages = each.stages(call, setting)
        step()


def _measure_training(everyone: Sequence[Contestant], setting: Setting, start: Start) -> None:
    trained = [c for c in everyone if c.runtime == PYTORCH and c.form in (EAGER, COMPILED)]
    calls = {each: each.training(setting) for each in trained}
    timings = measure(calls, setting, start, 'training step')
    for each, call in calls.items():
        each.result.training = timings[each]
        each.model.zero_grad(set_to_none=True)
        each.result.training_memory = peak_memory(call, setting.device)
        each.model.zero_grad(set_to_none=True)
