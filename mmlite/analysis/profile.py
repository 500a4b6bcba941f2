"""Where time goes: by stage of a detector, and by kind of operator of an encoder."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import profile, record_function

from .complexity import STAGES, is_deform_attn, stage_of
from .report import Table, giga, milliseconds
from .timing import Call, Setting, measure

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler would report that it runs

_REST_OF_ATTENTION = 'rest of attention'
# Sampling is the fused operator, or grid_sample where plain PyTorch runs, whose other operators
# are then the rest of attention.
_KIND_OF = {
    **dict.fromkeys(
        ('aten::linear', 'aten::mm', 'aten::addmm', 'aten::bmm', 'aten::baddbmm'), 'matrix products'
    ),
    'aten::grid_sampler': 'sampling',
    _REST_OF_ATTENTION: _REST_OF_ATTENTION,
    **dict.fromkeys(('aten::layer_norm', 'aten::native_layer_norm'), 'LayerNorm'),
}
KINDS = (*dict.fromkeys(_KIND_OF.values()), 'rest')


def _kind(event) -> str | None:
    return 'sampling' if event.name.startswith('mmlite::') else _KIND_OF.get(event.name)


@contextmanager
def _hooks(modules: Iterable[nn.Module], enter: Callable, leave: Callable):
    """Call ``enter(module)`` before and ``leave(module)`` after each of the modules runs."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(lambda m, args: enter(m)))
            hooks.enter_context(module.register_forward_hook(lambda m, args, out: leave(m)))
        yield


def profile_stages(
    model: nn.Module, call: Call, encoder_at: str | None, repeats: int, device: str = 'cpu'
) -> dict[str, float]:
    """Time the stages of a detector that ``call`` runs; medians of ``repeats`` runs.

    Time goes to the stage of the innermost module that is running, as FLOPs do, see
    :func:`~mmlite.analysis.complexity.stage_of`. ``encoder_at`` is the encoder's name.

    Returns:
        dict[str, float]: Seconds of each of :data:`~mmlite.analysis.complexity.STAGES`, where
        ``other`` holds query selection and post-processing, too, and of ``encoder.layers.<i>``,
        which are part of the encoder.
    """
    spans = {module: stage_of(name, encoder_at) for name, module in model.named_modules() if name}
    layers = getattr(model.get_submodule(encoder_at), 'layers', ()) if encoder_at else ()
    for index, layer in enumerate(layers):
        spans.update((module, f'encoder.layers.{index}') for module in layer.modules())
    running = ['other']
    seconds: dict[str, float] = {}
    last = 0.0

    def switch(span: str) -> None:
        """Book the time since the last switch, where the span changes."""
        nonlocal last
        if span != running[-1]:
            if torch.device(device).type == 'cuda':
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            seconds[running[-1]] += now - last
            last = now

    def enter(module: nn.Module) -> None:
        switch(spans[module])
        running.append(spans[module])

    def leave(module: nn.Module) -> None:
        switch(running[-2])
        running.pop()

    runs = []
    with _hooks(spans, enter, leave):
        for index in range(repeats + 1):  # one of warm-up
            seconds = dict.fromkeys([*STAGES, *spans.values()], 0.0)
            last = time.perf_counter()
            call(index)
            switch('end')
            seconds['encoder'] += sum(s for name, s in seconds.items() if '.layers.' in name)
            runs.append(seconds)
    return _medians(runs[1:])


def profile_kinds(
    encoder: nn.Module, call: Call, repeats: int, device: str = 'cpu'
) -> tuple[dict[str, float], int]:
    """Time the operators of ``call``, a forward pass of ``encoder``, and add them up by kind.

    Returns:
        tuple[dict[str, float], int]: Seconds of each of :data:`KINDS`, the median of ``repeats``
        runs by torch's profiler, and the FLOPs of the matrix products.
    """
    clocks = ['cpu']
    if torch.device(device).type == 'cuda':
        clocks = ['device', 'cuda']  # the second before torch 2.4
    ranges: list[record_function] = []

    def enter(module: nn.Module) -> None:
        ranges.append(record_function(_REST_OF_ATTENTION))
        ranges[-1].__enter__()

    def leave(module: nn.Module) -> None:
        ranges.pop().__exit__(None, None, None)

    runs = []
    with _hooks(filter(is_deform_attn, encoder.modules()), enter, leave):
        call(0)
        for index in range(repeats):
            with profile(with_flops=True) as run:
                call(index)
            # On a GPU the ranges show up a second time, as events of the device.
            events = [event for event in run.events() if event.device_type == DeviceType.CPU]
            runs.append(dict.fromkeys(KINDS, 0.0))
            for event in events:
                around = event
                while around is not None and _kind(around) is None:
                    around = around.cpu_parent
                kind = _kind(around) if around else 'rest'
                own = (getattr(event, f'self_{clock}_time_total', None) for clock in clocks)
                runs[-1][kind] += next(time for time in own if time is not None) / 1e6
    products = [e for e in events if _kind(e) == 'matrix products']
    # torch counts a multiply-add as two.
    return _medians(runs), sum(event.flops or 0 for event in products) // 2


def _medians(runs: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def matmul_peak(device: str = 'cpu', dtype: torch.dtype = torch.float32) -> float:
    """FLOPs a second (multiply-adds counted as one) of the best of some large matrix products."""
    size = 2048 if torch.device(device).type == 'cpu' else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = measure({'product': lambda index: a @ b}, Setting(device=device))['product']
    return size**3 / min(timing.seconds)


def profile_table(
    calls: Mapping[str, tuple[nn.Module, Call]], setting: Setting
) -> tuple[Table, dict]:
    """Where the time of encoders goes, and how near matrix products are to their own peak.

    Args:
        calls (Mapping[str, tuple[nn.Module, Call]]): Name -> an encoder and what runs it.
        setting (Setting): What it runs on.

    Returns:
        tuple[Table, dict]: A row an encoder, and the same figures for programs.
    """
    peak = matmul_peak(setting.device, getattr(torch, setting.dtype))
    rows, profiles = [], {}
    for name, (encoder, call) in calls.items():
        repeats = (setting.rounds + 1) // 2
        seconds, flops = profile_kinds(encoder, call, repeats, setting.device)
        profiles[name] = {'seconds': seconds, 'matmul_flops': flops}
        total, rate = sum(seconds.values()), flops / seconds['matrix products']
        parts = {kind: f'{milliseconds(s)} ({s / total:.0%})' for kind, s in seconds.items()}
        reach = f'{giga(rate)} GFLOP/s ({rate / peak:.0%})'
        sums = {'sum': milliseconds(total), 'matrix products reach': reach}
        rows.append({'encoder': name, **parts, **sums})
    title = f'Inference, ms by kind of operator (a large matrix product: {giga(peak)} GFLOP/s)'
    return Table(title, rows), {'profile': profiles, 'matmul_peak': peak}
