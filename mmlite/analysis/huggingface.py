"""Models of Hugging Face transformers: stock, on our operators, and with the Lite encoder.

Models are made from configs, with random weights; nothing is downloaded.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..huggingface import fuse, to_lite
from ..huggingface.attention import check_version
from .complexity import count_flops
from .latency import Call, Ratio, Timing, speedup
from .report import Report, Start, Table, giga, milliseconds, size
from .setting import Setting

TEXT_TOKENS = 195  # the 80 categories of COCO as one prompt
STOCK, PATCHED = 'stock', 'patched'


@dataclass(frozen=True)
class Kind:
    """A model to measure."""

    title: str
    build: Callable[[], nn.Module]
    schedule: str  # of the Lite encoder
    encoder: str  # where it is; of Mask2Former the pixel decoder: it and a few convolutions


@dataclass(frozen=True)
class Result:
    """One variant of a model; ratios are to the stock variant."""

    model: str
    variant: str
    timing: Timing
    faster: Ratio
    encoder_flops: int
    encoder_timing: Timing
    encoder_faster: Ratio
    difference: float | None  # of the patched variant's outputs from the stock one's, at most


def _backbone(kind: str, first_stage: int):
    import transformers as hf

    stages = [f'stage{stage}' for stage in range(first_stage, 5)]
    return getattr(hf, f'{kind}Config')(out_features=stages)  # ResNet-50, Swin-T by default


def _deformable_detr() -> nn.Module:
    import transformers as hf

    backbone = _backbone('ResNet', 2)
    return hf.DeformableDetrForObjectDetection(hf.DeformableDetrConfig(backbone_config=backbone))


def _grounding_dino() -> nn.Module:
    import transformers as hf

    backbone = _backbone('Swin', 2)
    config = hf.GroundingDinoConfig(backbone_config=backbone, text_config=hf.BertConfig())
    return hf.GroundingDinoForObjectDetection(config)


def _mask2former() -> nn.Module:
    import transformers as hf

    backbone = _backbone('ResNet', 1)
    return hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(backbone_config=backbone))


MODELS = {
    'deformable-detr': Kind(
        'Deformable DETR, ResNet-50', _deformable_detr, 'H3L1-(2+1)x3', 'model.encoder'
    ),
    'grounding-dino': Kind(
        'Grounding DINO, Swin-T', _grounding_dino, 'H3L1-(2+1)x3', 'model.encoder'
    ),
    'mask2former': Kind(
        'Mask2Former, ResNet-50', _mask2former, 'H2L1-(2+1)x3', 'model.pixel_level_module.decoder'
    ),
}


def report(setting: Setting, names: Sequence[str], schedule: str | None, start: Start) -> Report:
    """All that ``mmlite benchmark transformers`` measures.

    Args:
        setting (Setting): What to run.
        names (Sequence[str]): Of :data:`MODELS`; none for all.
        schedule (str, optional): Of the Lite encoder, in place of each model's own.
        start (Start): Shows progress.

    Raises:
        ValueError: There is no such model, or the schedule does not fit one.
        ImportError: transformers is missing or too old.
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f'there is no model {unknown[0]!r}; choose among {", ".join(MODELS)}')
    check_version()
    from transformers.utils import logging

    logging.set_verbosity_error()
    results = []
    for name in names or MODELS:
        results += _measure(MODELS[name], schedule or MODELS[name].schedule, setting, start)
    title = (
        f'Inference, {size(setting.image_size)}, batch {setting.batch_size}, {setting.dtype}, '
        f'{setting.device}; encoder: of Mask2Former its pixel decoder'
    )
    columns = {
        'model': lambda r: r.model,
        'variant': lambda r: r.variant,
        'model ms': lambda r: milliseconds(r.timing.median),
        'faster': lambda r: r.faster,
        'encoder ms': lambda r: milliseconds(r.encoder_timing.median),
        'encoder, faster': lambda r: r.encoder_faster,
        'encoder GFLOPs': lambda r: giga(r.encoder_flops),
    }
    notes = [
        f'{r.model}: the outputs of the patched model differ by at most {r.difference:.1e}.'
        for r in results
        if r.difference is not None
    ]
    if torch.device(setting.device).type == 'cpu':
        notes += [
            f'Our CPU kernels did not run: {backend.detail}.'
            for backend in ops.backends()
            if backend.name == 'cpu' and not backend.available
        ]
    return Report(asdict(setting), results, [Table.of(title, results, columns)], notes)


def _measure(kind: Kind, schedule: str, setting: Setting, start: Start) -> list[Result]:
    torch.manual_seed(0)
    stock = kind.build().eval().to(setting.device)
    patched, lite = copy.deepcopy(stock), copy.deepcopy(stock)
    fuse(patched)
    to_lite(lite, schedule)
    fuse(lite)
    variants = {STOCK: stock, PATCHED: patched, f'Lite {schedule}': lite}
    batch = _inputs(stock, setting)
    flops = {name: count_flops(model, **batch).of(kind.encoder) for name, model in variants.items()}
    watches = {
        name: _Watch(model.get_submodule(kind.encoder), setting.device)
        for name, model in variants.items()
    }
    first: dict[str, list[Tensor]] = {}

    def call_of(name: str) -> Call:
        def call(index: int) -> object:
            with torch.inference_mode(), setting.autocast():
                predicted = _predictions(variants[name](**batch))
            first.setdefault(name, predicted)
            return predicted

        return call

    timings = setting.measure({name: call_of(name) for name in variants}, start, kind.title)
    encoders = {}
    for name, watch in watches.items():  # what comes before are calls of warm-up
        encoders[name] = Timing(tuple(watch.seconds[-len(timings[name].seconds) :]))
    return [
        Result(
            kind.title,
            name,
            timings[name],
            speedup(timings[STOCK], timings[name]),
            flops[name],
            encoders[name],
            speedup(encoders[STOCK], encoders[name]),
            _difference(first[STOCK], first[name]) if name == PATCHED else None,
        )
        for name in variants
    ]


class _Watch:
    """Notes the seconds of every call of a module."""

    def __init__(self, module: nn.Module, device: str) -> None:
        self.seconds: list[float] = []
        self._device = torch.device(device)
        module.register_forward_pre_hook(self._begin, prepend=True)
        module.register_forward_hook(self._end)

    def _now(self) -> float:
        if self._device.type == 'cuda':
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _begin(self, *_) -> None:
        self._start = self._now()

    def _end(self, *_) -> None:
        self.seconds.append(self._now() - self._start)


def _inputs(model: nn.Module, setting: Setting) -> dict[str, Tensor]:
    size = (setting.batch_size, *setting.image_size)
    batch = {
        'pixel_values': torch.randn(size[0], 3, *size[1:]),
        'pixel_mask': torch.ones(size, dtype=torch.long),
    }
    if hasattr(model.config, 'text_config'):
        words = torch.randint(1100, model.config.text_config.vocab_size, (size[0], TEXT_TOKENS))
        words[:, 2::2] = 1012  # every other token is the full stop behind a category
        words[:, 0], words[:, -1] = 101, 102
        batch['input_ids'] = words
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


def _predictions(output) -> list[Tensor]:
    names = ('logits', 'pred_boxes', 'class_queries_logits', 'masks_queries_logits')
    return [output[name] for name in names if name in output]


def _difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The largest; equal infinities, which Grounding DINO has behind the text, differ by none."""
    return max(
        torch.where(ours == theirs, 0.0, ours - theirs).abs().max().item()
        for ours, theirs in zip(actual, expected)
    )
