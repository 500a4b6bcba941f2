"""``mmlite benchmark encoder``: the stock encoder of MMDetection against Lite schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from torch import nn

from ..openmmlab.layers import LiteEncoder, fuse
from .compare import EAGER, GRAPH, in_mode
from .complexity import count_flops, count_parameters
from .inputs import encoder_inputs, pyramid_sizes
from .profile import KINDS, matmul_peak, profile_kinds
from .report import Report, Table, giga, mebibytes, milliseconds, size, timing_columns
from .timing import Call, Setting, Start, measure, peak_memory, speedup

STOCK, STOCK_FUSED = 'stock (mmcv)', 'stock (ms_deform_attn)'
EMBED_DIMS = 256


def report(
    setting: Setting,
    schedules: Sequence[str],
    ffn_channels: int,
    profile: bool,
    start: Start,
    modes: Sequence[str] = (EAGER,),
) -> Report:
    """All that ``mmlite benchmark encoder`` measures.

    Args:
        setting (Setting): What to run; levels have strides 8 to 64.
        schedules (Sequence[str]): The Lite schedules, such as ``H3L1-(2+1)x3``.
        ffn_channels (int): Hidden size of the FFN: 2048 in DINO, 1024 in Deformable DETR.
        profile (bool): Also say where the time of inference goes.
        start (Start): Shows progress.
        modes (Sequence[str]): Of :data:`MODES`. The stock encoder always runs eagerly too, being
            what all is compared with.

    Raises:
        ValueError: A schedule is malformed or does not make six layers over four levels.
    """
    encoders = build_encoders(schedules, ffn_channels, setting.device)
    sizes = pyramid_sizes(setting.image_size)
    inputs = encoder_inputs(sizes, EMBED_DIMS, setting.batch_size, setting.device)
    contestants, notes = {}, []
    for name, encoder in encoders.items():
        cost = count_flops(encoder.eval(), **inputs).total, count_parameters(encoder)
        for mode in dict.fromkeys([EAGER, *modes] if name in (STOCK, STOCK_FUSED) else modes):
            title = name if mode == EAGER else f'{name}, {mode}'
            try:
                contestants[title] = (
                    in_mode(copy.deepcopy(encoder), mode, setting.device),
                    mode,
                    *cost,
                )
            except ValueError as error:
                notes.append(f'Not measured: {title}: {error}.')
    results = []
    for direction, make in list(_PASSES.items())[: 1 + setting.training]:
        calls = {
            name: make(encoder, inputs, setting)
            for name, (encoder, mode, *_) in contestants.items()
            if not (mode == GRAPH and make is _training_step)
        }
        timings = measure(calls, setting, start, direction)
        for name, timing in timings.items():
            encoder, mode, flops, params = contestants[name]
            results.append(
                {
                    **{'name': name, 'mode': mode, 'direction': direction},
                    **{'flops': flops, 'params': params, 'timing': timing},
                    'over_stock': speedup(timings[STOCK], timing),
                    'over_fused_stock': speedup(timings[STOCK_FUSED], timing),
                    'peak_memory': peak_memory(calls[name], setting.device),
                }
            )
            encoder.zero_grad(set_to_none=True)
    settings = {**asdict(setting), 'batch_size': setting.batch_size, 'embed_dims': EMBED_DIMS}
    settings.update(ffn_channels=ffn_channels, modes=modes)
    found = Report(settings, results, _tables(setting, ffn_channels, results), notes)
    if profile:
        _profile(found, encoders, inputs, setting)
    return found


def build_encoders(
    schedules: Sequence[str], ffn_channels: int, device: torch.device | str = 'cpu'
) -> dict[str, nn.Module]:
    """The stock encoder with mmcv's operator and with ours, and each schedule with both attentions.

    All have six layers and are randomly initialised.
    """
    shape = {'embed_dims': EMBED_DIMS}
    layer_cfg = {
        'self_attn_cfg': {**shape, 'num_levels': 4, 'dropout': 0.0, 'batch_first': True},
        'ffn_cfg': {**shape, 'feedforward_channels': ffn_channels, 'ffn_drop': 0.0},
    }
    encoders = {
        name: DeformableDetrTransformerEncoder(num_layers=6, layer_cfg=layer_cfg)
        for name in (STOCK, STOCK_FUSED)
    }
    fuse(encoders[STOCK_FUSED])
    for schedule in schedules:
        for key_aware, what in ((True, ''), (False, ', no KDA')):
            encoders[f'Lite {schedule}{what}'] = LiteEncoder(
                schedule, num_layers=6, layer_cfg=layer_cfg, key_aware=key_aware
            )
    return {name: encoder.to(device) for name, encoder in encoders.items()}


def _inference(encoder: nn.Module, inputs: dict, setting: Setting) -> Call:
    def call(index: int) -> object:
        encoder.eval()
        with torch.no_grad(), setting.autocast():
            return encoder(**inputs)

    return call


def _training_step(encoder: nn.Module, inputs: dict, setting: Setting) -> Call:
    def call(index: int) -> object:
        encoder.train()
        encoder.zero_grad(set_to_none=True)
        query = inputs['query'].detach().requires_grad_()  # the backbone learns, too
        with setting.autocast():
            memory = encoder(**{**inputs, 'query': query})
        memory.backward(memory.detach())
        return query.grad

    return call


_PASSES = {'inference': _inference, 'training step': _training_step}


def _tables(setting: Setting, ffn_channels: int, results: Sequence[dict]) -> list[Table]:
    """One for each direction."""
    tokens = sum(h * w for h, w in pyramid_sizes(setting.image_size))
    what = (
        f'{size(setting.image_size)} ({tokens} tokens), batch {setting.batch_size}, '
        f'{EMBED_DIMS} channels, FFN {ffn_channels}, {setting.dtype}'
    )
    columns = {
        'encoder': lambda r: r['name'],
        'params M': lambda r: f'{r["params"] / 1e6:.2f}',
        'GFLOPs': lambda r: giga(r['flops']),
        **timing_columns(lambda r: r['timing']),
        'over stock': lambda r: r['over_stock'],
        'over stock, our op': lambda r: r['over_fused_stock'],
        'FLOPs saved': lambda r: f'{results[0]["flops"] / r["flops"]:.2f}x',
        'peak MiB': lambda r: mebibytes(r['peak_memory']),
    }
    return [
        Table.of(f'Encoder, {direction}, {what}', rows, columns)
        for direction in _PASSES
        if (rows := [r for r in results if r['direction'] == direction])
    ]


def _profile(found: Report, encoders: dict, inputs: dict, setting: Setting) -> None:
    """Add where the time goes, and how near the matrix products are to their own peak."""
    peak = matmul_peak(setting.device, getattr(torch, setting.dtype))
    profiles = {}
    for name, encoder in encoders.items():
        call = _inference(encoder, inputs, setting)
        seconds, flops = profile_kinds(encoder, call, (setting.rounds + 1) // 2, setting.device)
        profiles[name] = {'seconds': seconds, 'matmul_flops': flops}

    def part(kind: str) -> Callable[[str], str]:
        def cell(name: str) -> str:
            seconds = profiles[name]['seconds']
            return f'{milliseconds(seconds[kind])} ({seconds[kind] / sum(seconds.values()):.0%})'

        return cell

    def reach(name: str) -> str:
        rate = profiles[name]['matmul_flops'] / profiles[name]['seconds']['matrix products']
        return f'{giga(rate)} GFLOP/s ({rate / peak:.0%})'

    columns = {
        'encoder': str,
        **{kind: part(kind) for kind in KINDS},
        'sum': lambda name: milliseconds(sum(profiles[name]['seconds'].values())),
        'matrix products reach': reach,
    }
    title = f'Inference, ms by kind of operator (a large matrix product: {giga(peak)} GFLOP/s)'
    found.tables.append(Table.of(title, profiles, columns))
    found.further = {'profile': profiles, 'matmul_peak': peak}
