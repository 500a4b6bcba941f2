"""Where time goes, by torch's profiler: by kind of operator, and by stage of a detector."""

from __future__ import annotations

import os
import statistics
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, record_function

from ..openmmlab.families import encoder_name
from .complexity import STAGES, deform_attn_modules, stage_of
from .latency import Call, measure

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler would report that it runs

_ATTENTION, _WHOLE, _LAYER = 'rest of attention', 'whole call', 'encoder.layers.'
_KINDS = {
    'matrix products': ('aten::linear', 'aten::mm', 'aten::addmm', 'aten::bmm', 'aten::baddbmm'),
    'sampling': (
        'aten::grid_sampler',
        'mmlite::key_aware_deform_attn',
        'mmlite::key_aware_deform_attn_from_offsets',
        'mmlite::ms_deform_attn',
        'mmlite::ms_deform_attn_from_offsets',
    ),
    _ATTENTION: (_ATTENTION,),
    'LayerNorm': ('aten::layer_norm', 'aten::native_layer_norm'),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
KINDS = (*_KINDS, 'rest')


@dataclass(frozen=True)
class OpProfile:
    """Time of a call by kind of operator.

    Sampling is the fused operator, or ``grid_sample`` where plain PyTorch runs, whose other
    operators are then the rest of attention. An operator's time includes what it calls.
    """

    seconds: dict[str, float]  # for each of KINDS
    matmul_flops: int  # of the matrix products

    @property
    def matmul_rate(self) -> float:
        """FLOPs a second that the matrix products reach."""
        return self.matmul_flops / self.seconds['matrix products']

    def share(self, kind: str) -> float:
        """Part of the time, 0 to 1."""
        return self.seconds[kind] / sum(self.seconds.values())


def profile_ops(
    module: nn.Module, call: Call, *, repeats: int = 5, device: torch.device | str = 'cpu'
) -> OpProfile:
    """Time the operators of ``call``, a forward pass of ``module``, and add them up by kind.

    Of ``repeats`` runs, after one of warm-up, the median of each kind is kept.
    """
    ranges = {child: _ATTENTION for child in deform_attn_modules(module)}
    runs = []
    for events in _record(ranges, call, repeats, device):
        runs.append(dict.fromkeys(KINDS, 0.0))
        for event in events:
            runs[-1][_kind(event)] += _seconds(event, device, 'self_')
    products = [e for e in events if _KIND_OF.get(e.name) == 'matrix products']
    # torch counts a multiply-add as two.
    return OpProfile(_medians(runs), sum(event.flops or 0 for event in products) // 2)


def profile_stages(
    model: nn.Module, call: Call, *, repeats: int = 5, device: torch.device | str = 'cpu'
) -> dict[str, float]:
    """Time the stages of a detector that ``call`` runs; medians as in :func:`profile_ops`.

    Time goes to the stage of the module that spends it, as FLOPs do, see
    :func:`~mmlite.analysis.complexity.stage_of`.

    Returns:
        dict[str, float]: Seconds of each of :data:`~mmlite.analysis.complexity.STAGES`, where
        ``other`` holds query selection and post-processing, too, and of ``encoder.layers.<i>``,
        which are part of the encoder.
    """
    ranges = _stage_ranges(model)
    runs = []
    for events in _record(ranges, call, repeats, device):
        seconds = dict.fromkeys([*STAGES, *ranges.values(), _WHOLE], 0.0)
        for event in events:
            if event.name in seconds:
                spent = _seconds(event, device)
                seconds[event.name] += spent
                around = _range_around(event, seconds.keys())
                if around is not None:
                    seconds[around.name] -= spent
        seconds['other'] += seconds.pop(_WHOLE)
        seconds['encoder'] += sum(s for name, s in seconds.items() if name.startswith(_LAYER))
        runs.append(seconds)
    return _medians(runs)


def _stage_ranges(model: nn.Module) -> dict[nn.Module, str]:
    """Every module with its stage, or with the layer of the encoder that it is in."""
    try:
        encoder = encoder_name(model)
        layers = list(model.get_submodule(encoder).layers)
    except ValueError:
        encoder, layers = 'encoder', []
    ranges = {module: stage_of(name, encoder) for name, module in model.named_modules() if name}
    for index, layer in enumerate(layers):
        ranges.update((module, f'{_LAYER}{index}') for module in layer.modules())
    return ranges


def _range_around(event: FunctionEvent, names: Container[str]) -> FunctionEvent | None:
    around = event.cpu_parent
    while around is not None and around.name not in names:
        around = around.cpu_parent
    return around


def _record(
    ranges: Mapping[nn.Module, str], call: Call, repeats: int, device: torch.device | str
) -> Iterator[list[FunctionEvent]]:
    """The events of each run; what a module in ``ranges`` does lies within one of its name.

    A module within one of the same name opens none of its own.
    """
    running: list[tuple[str, record_function | None]] = []

    def enter(module: nn.Module, args: tuple) -> None:
        name = ranges[module]
        opened = None if running and running[-1][0] == name else record_function(name)
        if opened is not None:
            opened.__enter__()
        running.append((name, opened))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        _, opened = running.pop()
        if opened is not None:
            opened.__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter) for module in ranges]
    hooks += [module.register_forward_hook(leave) for module in ranges]
    try:
        call(0)
        for index in range(repeats):
            with profile(with_flops=True) as run, record_function(_WHOLE):
                call(index)
            # On a GPU the ranges show up a second time, as events of the device.
            yield [event for event in run.events() if event.device_type == DeviceType.CPU]
    finally:
        for hook in hooks:
            hook.remove()


def _kind(event: FunctionEvent | None) -> str:
    """That of the innermost operator or range around an event which has one."""
    while event is not None:
        if event.name in _KIND_OF:
            return _KIND_OF[event.name]
        event = event.cpu_parent
    return 'rest'


def _seconds(event: FunctionEvent, device: torch.device | str, prefix: str = '') -> float:
    clock = 'cpu'
    if torch.device(device).type == 'cuda':
        clock = 'device' if hasattr(event, 'device_time_total') else 'cuda'  # before torch 2.4
    return getattr(event, f'{prefix}{clock}_time_total') / 1e6


def _medians(runs: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def matmul_peak(device: torch.device | str = 'cpu', dtype: torch.dtype = torch.float32) -> float:
    """FLOPs a second (multiply-adds counted as one) of the best of some large matrix products."""
    size = 2048 if torch.device(device).type == 'cpu' else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size**3 / min(measure({'': lambda index: a @ b}, device=device)[''].seconds)
