"""Where time goes: by stage of a detector, and by kind of operator."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import profile, record_function

from .complexity import STAGES, is_deform_attn, stage_of
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
    'mmlite::deform_attn': 'sampling',
    _REST_OF_ATTENTION: _REST_OF_ATTENTION,
    **dict.fromkeys(('aten::layer_norm', 'aten::native_layer_norm'), 'LayerNorm'),
}
KINDS = (*dict.fromkeys(_KIND_OF.values()), 'rest')


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

    def enter(module: nn.Module, args: tuple) -> None:
        switch(spans[module])
        running.append(spans[module])

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        switch(running[-2])
        running.pop()

    runs = []
    with ExitStack() as hooks:
        for module in spans:
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
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
    ranges: list[record_function] = []

    def enter(module: nn.Module, args: tuple) -> None:
        ranges.append(record_function(_REST_OF_ATTENTION))
        ranges[-1].__enter__()

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        ranges.pop().__exit__(None, None, None)

    runs = []
    with ExitStack() as hooks:
        for module in filter(is_deform_attn, encoder.modules()):
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        call(0)
        for index in range(repeats):
            with profile(with_flops=True) as run:
                call(index)
            # On a GPU the ranges show up a second time, as events of the device.
            events = [event for event in run.events() if event.device_type == DeviceType.CPU]
            runs.append(dict.fromkeys(KINDS, 0.0))
            for event in events:
                around = event
                while around is not None and around.name not in _KIND_OF:
                    around = around.cpu_parent
                runs[-1][_KIND_OF[around.name] if around else 'rest'] += _seconds(event, device)
    products = [e for e in events if _KIND_OF.get(e.name) == 'matrix products']
    # torch counts a multiply-add as two.
    return _medians(runs), sum(event.flops or 0 for event in products) // 2


def _seconds(event, device: str) -> float:
    """What an event spent itself, the events inside it apart."""
    clock = 'cpu'
    if torch.device(device).type == 'cuda':
        clock = 'device' if hasattr(event, 'device_time_total') else 'cuda'  # before torch 2.4
    return getattr(event, f'self_{clock}_time_total') / 1e6


def _medians(runs: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def matmul_peak(device: str = 'cpu', dtype: torch.dtype = torch.float32) -> float:
    """FLOPs a second (multiply-adds counted as one) of the best of some large matrix products."""
    size = 2048 if torch.device(device).type == 'cpu' else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = measure({'product': lambda index: a @ b}, Setting(device=device))['product']
    return size**3 / min(timing.seconds)
