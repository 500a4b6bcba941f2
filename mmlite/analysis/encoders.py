"""Encoders alone: the stock one of MMDetection against Lite schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.layers import DeformableDetrTransformerEncoder
from torch import nn

from ..layers import FusedDeformableAttention, LiteEncoder
from .complexity import count_flops, count_parameters
from .inputs import encoder_inputs, level_sizes
from .latency import Ratio, Timing, measure, measurements, speedup
from .memory import peak_memory
from .profile import OpProfile, matmul_peak, profile_ops
from .report import Table, giga, mebibytes, milliseconds, timing_cells

STOCK, STOCK_FUSED = 'stock (mmcv)', 'stock (ms_deform_attn)'
PASSES = ('inference', 'training step')


@dataclass(frozen=True)
class Setting:
    """What the encoders are built for and fed with.

    Attributes:
        image_size (tuple[int, int]): Height and width in pixels; levels have strides 8 to 64.
        batch_size (int): Images.
        embed_dims (int): Channels.
        ffn_channels (int): Hidden size of the FFN: 2048 in DINO, 1024 in Deformable DETR.
        dtype (str): ``float32``, or what autocast runs in.
        device (str): Where to run.
    """

    image_size: tuple[int, int] = (800, 1333)
    batch_size: int = 1
    embed_dims: int = 256
    ffn_channels: int = 2048
    dtype: str = 'float32'
    device: str = 'cpu'


@dataclass(frozen=True)
class EncoderResult:
    """One encoder in one direction.

    Attributes:
        name (str): What it is.
        direction (str): ``inference`` or ``training step`` (forward and backward).
        flops (int): FLOPs of a forward pass.
        params (int): Parameters.
        timing (Timing): Seconds.
        over_stock (Ratio): How many times faster than the stock encoder with mmcv's operator.
        over_fused_stock (Ratio): How many times faster than the stock encoder with ours.
        peak_memory (int | None): Bytes beyond parameters and inputs.
    """

    name: str
    direction: str
    flops: int
    params: int
    timing: Timing
    over_stock: Ratio
    over_fused_stock: Ratio
    peak_memory: int | None

    def as_json(self) -> dict:
        return {**asdict(self), 'timing': self.timing.as_json()}


def build_encoders(setting: Setting, schedules: Sequence[str]) -> dict[str, nn.Module]:
    """The stock encoder with mmcv's operator and with ours, and each schedule with both attentions.

    Args:
        setting (Setting): Sizes.
        schedules (Sequence[str]): For example ``['H3L1-(2+1)x3']``.

    Returns:
        dict[str, nn.Module]: Six layers each, on the device, randomly initialised.

    Raises:
        ValueError: A schedule is malformed or does not make six layers over four levels.
    """
    attention = {'embed_dims': setting.embed_dims, 'num_levels': 4, 'dropout': 0.0}
    layer_cfg = {
        'self_attn_cfg': {**attention, 'batch_first': True},
        'ffn_cfg': {
            'embed_dims': setting.embed_dims,
            'feedforward_channels': setting.ffn_channels,
            'ffn_drop': 0.0,
        },
    }
    encoders = {
        name: DeformableDetrTransformerEncoder(num_layers=6, layer_cfg=layer_cfg)
        for name in (STOCK, STOCK_FUSED)
    }
    for layer in encoders[STOCK_FUSED].layers:
        # Not layers.stock.fuse_attention, which leaves GPUs to mmcv.
        layer.self_attn = FusedDeformableAttention(**layer_cfg['self_attn_cfg'])
    for schedule in schedules:
        for key_aware in (True, False):
            name = f'Lite {schedule}' if key_aware else f'Lite {schedule}, no KDA'
            encoders[name] = LiteEncoder(
                schedule, num_layers=6, layer_cfg=layer_cfg, key_aware=key_aware
            )
    return {name: encoder.to(setting.device) for name, encoder in encoders.items()}


def benchmark_encoders(
    setting: Setting,
    schedules: Sequence[str],
    *,
    training: bool = False,
    rounds: int = 10,
    warmup: int = 2,
    start: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> list[EncoderResult]:
    """Measure the encoders of :func:`build_encoders` in the same rounds.

    Args:
        setting (Setting): What to build and run.
        schedules (Sequence[str]): The Lite schedules.
        training (bool): Also measure forward and backward.
        rounds (int): Measurements of each encoder.
        warmup (int): Calls before.
        start (Callable): Called with the number of steps ahead; returns what to call after each.

    Returns:
        list[EncoderResult]: One entry for each encoder and direction.
    """
    encoders = build_encoders(setting, schedules)
    inputs = _inputs(setting)
    one_image = _inputs(setting, batch_size=1)
    flops = {
        name: setting.batch_size * count_flops(encoder.eval(), **one_image).total
        for name, encoder in encoders.items()
    }
    results = []
    for direction in PASSES[: 2 if training else 1]:
        calls = {
            name: _call(encoder, inputs, setting, direction) for name, encoder in encoders.items()
        }
        timings = measure(
            calls,
            rounds=rounds,
            warmup=warmup,
            device=setting.device,
            on_step=start(measurements(len(calls), rounds)),
        )
        for name, timing in timings.items():
            results.append(
                EncoderResult(
                    name,
                    direction,
                    flops[name],
                    count_parameters(encoders[name]),
                    timing,
                    speedup(timings[STOCK], timing),
                    speedup(timings[STOCK_FUSED], timing),
                    peak_memory(lambda call=calls[name]: call(0), setting.device),
                )
            )
            for parameter in encoders[name].parameters():
                parameter.grad = None
    return results


def profile_encoders(
    setting: Setting, schedules: Sequence[str], repeats: int = 5
) -> tuple[dict[str, OpProfile], float]:
    """Where the time of inference goes.

    Args:
        setting (Setting): What to build and run.
        schedules (Sequence[str]): The Lite schedules.
        repeats (int): Runs; the median of each kind of operator is kept.

    Returns:
        tuple[dict[str, OpProfile], float]: A profile for each encoder, and the FLOPs a second
        that a large matrix product reaches here.
    """
    inputs = _inputs(setting)
    profiles = {
        name: profile_ops(
            encoder,
            _call(encoder, inputs, setting, PASSES[0]),
            (MultiScaleDeformableAttention,),
            repeats=repeats,
            device=setting.device,
        )
        for name, encoder in build_encoders(setting, schedules).items()
    }
    return profiles, matmul_peak(setting.device, getattr(torch, setting.dtype))


def _inputs(setting: Setting, batch_size: int | None = None) -> dict:
    return encoder_inputs(
        level_sizes(setting.image_size),
        setting.embed_dims,
        batch_size or setting.batch_size,
        device=setting.device,
    )


def _call(
    encoder: nn.Module, inputs: dict, setting: Setting, direction: str
) -> Callable[[int], object]:
    autocast = torch.autocast(
        torch.device(setting.device).type,
        dtype=getattr(torch, setting.dtype),
        enabled=setting.dtype != 'float32',
    )

    def inference(index: int) -> object:
        encoder.eval()
        with torch.no_grad(), autocast:
            return encoder(**inputs)

    def training_step(index: int) -> object:
        encoder.train()
        encoder.zero_grad(set_to_none=True)
        query = inputs['query'].detach().requires_grad_()  # the backbone learns, too
        with autocast:
            memory = encoder(**{**inputs, 'query': query})
        memory.backward(memory.detach())
        return query.grad

    return inference if direction == PASSES[0] else training_step


def tables(setting: Setting, results: Sequence[EncoderResult]) -> list[Table]:
    """The results for people, one table for each direction."""
    height, width = setting.image_size
    tokens = sum(h * w for h, w in level_sizes(setting.image_size))
    shown = []
    for direction in dict.fromkeys(result.direction for result in results):
        chosen = [result for result in results if result.direction == direction]
        table = Table(
            f'Encoder, {direction}, {height}x{width} ({tokens} tokens), '
            f'batch {setting.batch_size}, {setting.embed_dims} channels, '
            f'FFN {setting.ffn_channels}, {setting.dtype}',
            (
                *('encoder', 'params M', 'GFLOPs', 'median ms', 'mean ms', 'p95 ms'),
                *('over stock', 'over stock, our op', 'FLOPs saved', 'peak MiB'),
            ),
        )
        for result in chosen:
            table.rows.append(
                (
                    result.name,
                    f'{result.params / 1e6:.2f}',
                    giga(result.flops),
                    *timing_cells(result.timing),
                    str(result.over_stock),
                    str(result.over_fused_stock),
                    f'{chosen[0].flops / result.flops:.2f}x',
                    mebibytes(result.peak_memory),
                )
            )
        shown.append(table)
    return shown


def profile_table(profiles: dict[str, OpProfile], peak: float) -> Table:
    """Where the time goes, and how near the matrix products are to their own peak."""
    kinds = list(next(iter(profiles.values())).seconds)
    table = Table(
        f'Inference, ms by kind of operator (a large matrix product: {giga(peak)} GFLOP/s)',
        ('encoder', *kinds, 'sum', 'matrix products reach'),
    )
    for name, profile in profiles.items():
        total = sum(profile.seconds.values())
        cells = [f'{milliseconds(profile.seconds[k])} ({profile.share(k):.0%})' for k in kinds]
        rate = profile.matmul_rate
        table.rows.append(
            (name, *cells, milliseconds(total), f'{giga(rate)} GFLOP/s ({rate / peak:.0%})')
        )
    return table
