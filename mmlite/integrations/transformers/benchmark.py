"""Time models of transformers: stock, on our operators, and with the Lite encoder.

    python -m mmlite.integrations.transformers.benchmark --threads 2

Models are made from configs, with random weights; nothing is downloaded.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .attention import check_version, fuse_attention
from .encoder import to_lite

TEXT_TOKENS = 195  # the 80 categories of COCO as one prompt


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


# Name on the command line -> in words, builder, schedule, where the encoder is; of Mask2Former the
# pixel decoder, which is the encoder and a few convolutions.
MODELS: dict[str, tuple[str, Callable[[], nn.Module], str, str]] = {
    'deformable-detr': (
        'Deformable DETR, ResNet-50',
        _deformable_detr,
        'H3L1-(2+1)x3',
        'model.encoder',
    ),
    'grounding-dino': (
        'Grounding DINO, Swin-T',
        _grounding_dino,
        'H3L1-(2+1)x3',
        'model.encoder',
    ),
    'mask2former': (
        'Mask2Former, ResNet-50',
        _mask2former,
        'H2L1-(2+1)x3',
        'model.pixel_level_module.decoder',
    ),
}


@click.command()
@click.argument('names', nargs=-1, metavar='[MODEL]...')
@click.option('--size', nargs=2, type=click.IntRange(64), default=(800, 1333), show_default=True)
@click.option('--schedule', help="Of the Lite encoder; each model's own by default.")
@click.option('--threads', type=click.IntRange(1), default=2, show_default=True)
@click.option('--repeat', type=click.IntRange(1), default=2, show_default=True)
@click.option('--device', default='cpu', show_default=True)
@click.option('--json', 'json_file', type=click.Path(path_type=Path), help='Write it here too.')
def main(
    names: tuple[str, ...],
    size: tuple[int, int],
    schedule: str | None,
    threads: int,
    repeat: int,
    device: str,
    json_file: Path | None,
) -> None:
    """Time each MODEL in its three variants, in turns, after one call that is not counted.

    Prints the fastest of the calls, of the whole model and of its encoder (Mask2Former: its pixel
    decoder), and the latter's multiply-adds in matrix products (sampling is not counted).

    Example: python -m mmlite.integrations.transformers.benchmark mask2former --repeat 3
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise click.UsageError(f'no model {unknown[0]!r}; there are {", ".join(MODELS)}')
    check_version()
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    rows = []
    for name in names or MODELS:
        words, build, own_schedule, encoder = MODELS[name]
        rows += _measure(words, build, schedule or own_schedule, encoder, size, repeat, device)
    click.echo(_table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + '\n')


def _measure(
    words: str,
    build: Callable[[], nn.Module],
    schedule: str,
    encoder: str,
    size: tuple[int, int],
    repeat: int,
    device: str,
) -> list[dict]:
    torch.manual_seed(0)
    stock = build().eval().to(device)
    patched, lite = copy.deepcopy(stock), copy.deepcopy(stock)
    fuse_attention(patched)
    to_lite(lite, schedule)
    fuse_attention(lite)
    variants = {'stock': stock, 'patched': patched, f'Lite {schedule}': lite}
    batch = _inputs(stock, size, device)
    clocks = {name: _Clock(model, encoder) for name, model in variants.items()}
    with torch.inference_mode():
        first = {name: clock.warm_up(batch) for name, clock in clocks.items()}
        for _ in range(repeat):
            for clock in clocks.values():
                clock(batch)
    # Equal infinities, which Grounding DINO has behind the text, differ by nothing.
    difference = max(
        torch.where(ours == theirs, 0.0, ours - theirs).abs().max().item()
        for ours, theirs in zip(first['patched'][0], first['stock'][0])
    )
    rows = []
    for name, clock in clocks.items():
        model_ms, encoder_ms = (1000 * min(column) for column in zip(*clock.times))
        row = dict(model=words, variant=name, model_ms=model_ms, encoder_ms=encoder_ms)
        row['encoder_gmacs'] = first[name][1]
        row['difference'] = difference if name == 'patched' else None
        rows.append(row)
    return rows


class _Clock:
    """Calls a model, and notes the seconds of the whole and of its encoder."""

    def __init__(self, model: nn.Module, encoder: str) -> None:
        self.model = model
        self.times: list[tuple[float, float]] = []
        self._marks: list[float] = []
        self._counter: FlopCounterMode | None = None
        part = model.get_submodule(encoder)
        part.register_forward_pre_hook(self._before_encoder, prepend=True)
        part.register_forward_hook(self._after_encoder)

    def warm_up(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], float]:
        """What the model predicts, and 10^9 multiply-adds of the encoder's matrix products."""
        self._counter = counter = FlopCounterMode(display=False)
        predicted = self(batch)
        self._counter = None
        self.times.clear()
        return predicted, counter.get_total_flops() / 2e9

    def __call__(self, batch: dict[str, Tensor]) -> list[Tensor]:
        self._marks = []
        self._mark()
        result = self.model(**batch)
        self._mark()
        start, encoder_start, encoder_stop, stop = self._marks
        self.times.append((stop - start, encoder_stop - encoder_start))
        names = ('logits', 'pred_boxes', 'class_queries_logits', 'masks_queries_logits')
        return [result[name] for name in names if name in result]

    def _before_encoder(self, *_) -> None:
        self._mark()
        if self._counter is not None:
            self._counter.__enter__()

    def _after_encoder(self, *_) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
        self._mark()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())


def _inputs(model: nn.Module, size: tuple[int, int], device: str) -> dict[str, Tensor]:
    height, width = size
    batch = dict(
        pixel_values=torch.randn(1, 3, height, width, device=device),
        pixel_mask=torch.ones(1, height, width, dtype=torch.long, device=device),
    )
    if hasattr(model.config, 'text_config'):
        words = torch.randint(2000, 20000, (1, TEXT_TOKENS), device=device)
        words[:, 2::2] = 1012  # every other token is the full stop behind a category
        words[:, 0], words[:, -1] = 101, 102
        batch['input_ids'] = words
    return batch


def _table(rows: list[dict]) -> str:
    """Markdown, each model's times relative to its stock variant."""
    lines = [
        '| model | variant | model, ms | encoder or pixel decoder, ms | G multiply-adds of it |',
        '|---|---|---|---|---|',
    ]
    stock = {}
    for row in rows:
        stock.setdefault(row['model'], row)
        cells = [row['model'], row['variant']]
        for column in ('model_ms', 'encoder_ms'):
            times = stock[row['model']][column] / row[column]
            cells.append(
                f'{row[column]:.0f} ({times:.1f}x)' if times != 1 else f'{row[column]:.0f}'
            )
        cells.append(f'{row["encoder_gmacs"]:.1f}')
        lines.append(f'| {" | ".join(cells)} |')
    for row in rows:
        if row['difference'] is not None:
            lines.append(f'\n{row["model"]}: patched differs by at most {row["difference"]:.1e}')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
