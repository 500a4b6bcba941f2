"""``mmlite benchmark ops``: every backend of the operators against plain PyTorch and mmcv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import ops
from .inputs import OperatorInputs, OperatorShape
from .report import Report, Table, mebibytes, milliseconds, size, times
from .timing import (
    Call,
    Ratio,
    Setting,
    Start,
    Timing,
    measure,
    num_threads,
    peak_memory,
    silent,
    speedup,
)

Operator = Callable[[OperatorInputs], Tensor]

STANDARD, KEY_AWARE = 'ms_deform_attn', 'key_aware_deform_attn'
PASSES = ('forward', 'forward+backward')
_FUSED = {'cpu': 'cpu', 'cuda': 'triton'}


@dataclass(frozen=True)
class OperatorResult:
    """One operator on one backend."""

    operator: str  # ms_deform_attn or key_aware_deform_attn
    backend: str  # reference, cpu, triton, or one of OTHERS
    direction: str  # of PASSES
    timing: Timing
    over_reference: Ratio  # how many times faster than the same operator in plain PyTorch
    over_mmcv: Ratio | None  # how many times faster than mmcv's ms_deform_attn
    peak_memory: int | None  # bytes beyond the inputs
    moved: int  # bytes of all inputs and the output of a forward pass, each once


def report(
    shape: OperatorShape,
    passes: Sequence[str],
    rounds: int,
    warmup: int,
    scaling: bool,
    start: Start,
) -> Report:
    """All that ``mmlite benchmark ops`` measures, with ``scaling`` also at other sizes."""
    results, left_out = benchmark_operators(
        shape, passes=passes, rounds=rounds, warmup=warmup, start=start
    )
    dtype = str(shape.dtype).removeprefix('torch.')
    what = (
        f'{size(shape.image_size)} ({shape.num_queries or shape.num_tokens} queries, '
        f'{shape.num_tokens} tokens), batch {shape.batch_size}, M {shape.num_heads}, '
        f'D {shape.head_dim}, P {shape.num_points}, {dtype}, {shape.locations} locations'
    )
    tables = [
        Table(f'{way}, {what}', [_cells(r) for r in results if r.direction == way])
        for way in passes
    ]
    points: list[dict] = []
    axes = _axes(shape) if scaling else {}
    step = start('scaling', sum(map(len, axes.values())))
    for axis, values in axes.items():
        head, lines = axis.replace('_', ' '), []
        for value in values:
            seconds = scaled(shape, axis, value, rounds)
            points.append({'axis': axis, 'value': value, 'seconds': seconds})
            shown = size(value) if axis == 'image_size' else value
            lines.append({head: shown, **{k: milliseconds(s) for k, s in seconds.items()}})
            step()
        tables.append(Table(f'Forward, median ms, by {head}', lines))
    return Report(
        settings={**asdict(shape), 'dtype': dtype, 'rounds': rounds},
        results=results,
        tables=tables,
        notes=[f'Not measured: {name}: {reason}.' for name, reason in left_out.items()],
        further={'scaling': points, 'left_out': left_out},
    )


def benchmark_operators(
    shape: OperatorShape,
    *,
    passes: Sequence[str] = PASSES,
    rounds: int = 10,
    warmup: int = 2,
    start: Start = silent,
) -> tuple[list[OperatorResult], dict[str, str]]:
    """Measure every backend that runs on the device, all in the same rounds.

    ``passes`` are of :data:`PASSES`; ``rounds`` counts the measurements of each contestant.

    Returns:
        tuple[list[OperatorResult], dict[str, str]]: The results, and why others were left out.
    """
    # Rotating inputs: a GPU would otherwise find the last call's in its cache.
    inputs = [shape.inputs(seed) for seed in range(1 if shape.device == 'cpu' else 4)]
    setting = Setting(rounds=rounds, warmup=warmup, device=shape.device)
    operators, left_out = contestants(inputs[0], shape.device)
    results = []
    for direction in passes:
        make = _forward if direction == 'forward' else _forward_backward
        calls = {name: make(operator, inputs) for name, operator in operators.items()}
        timings = measure(calls, setting, start, f'operators, {direction}', min_seconds=0.02)
        mmcv = timings.get((STANDARD, 'mmcv'))
        for (operator, backend), timing in timings.items():
            over_reference = speedup(timings[operator, 'reference'], timing)
            over_mmcv = speedup(mmcv, timing) if mmcv else None
            memory = peak_memory(calls[operator, backend], shape.device)
            figures = (timing, over_reference, over_mmcv, memory, _bytes(operator, inputs[0]))
            results.append(OperatorResult(operator, backend, direction, *figures))
    return results, left_out


def scaled(shape: OperatorShape, axis: str, value: object, rounds: int = 10) -> dict[str, float]:
    """Median seconds of a forward pass, by contestant, with one thing changed.

    ``axis`` is ``image_size``, ``num_queries`` or ``threads``.
    """
    point = shape if axis == 'threads' else replace(shape, **{axis: value})
    with num_threads(value if axis == 'threads' else None):
        results, _ = benchmark_operators(point, passes=PASSES[:1], rounds=rounds, warmup=1)
    return {f'{r.operator} ({r.backend})': r.timing.median for r in results}


def _axes(shape: OperatorShape) -> dict[str, list]:
    """What ``--scaling`` varies."""
    (height, width), tokens = shape.image_size, shape.num_tokens
    axes = {
        'image_size': [(height * s // 4, width * s // 4) for s in (2, 3, 4, 5)],
        'num_queries': [*(n for n in (300, 900, 3000, 10000) if n < tokens), tokens],
    }
    if shape.device == 'cpu':
        most = torch.get_num_threads()
        axes['threads'] = sorted({1, *(n for n in (2, 4, 8, 16, 32) if n < most), most})
    return axes


def _cells(result: OperatorResult) -> dict[str, object]:
    cells = {
        'operator': result.operator,
        'backend': result.backend,
        **times(result.timing),
        'over PyTorch': result.over_reference,
        'over mmcv standard': result.over_mmcv or '-',
        'peak MiB': mebibytes(result.peak_memory),
    }
    if result.direction == 'forward':
        cells['GB/s'] = f'{result.moved / result.timing.median / 1e9:.2f}'
    return cells


def mmcv(device: str) -> Operator:
    """mmcv's standard operator: compiled on CUDA, grid_sample on the CPU."""
    from mmcv.ops import multi_scale_deform_attn as mmcv

    def on_cuda(x: OperatorInputs) -> Tensor:
        return mmcv.MultiScaleDeformableAttnFunction.apply(*arguments(x), len(x.value))

    def on_cpu(x: OperatorInputs) -> Tensor:
        value, shapes, _, locations, weights = arguments(x)
        return mmcv.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    return on_cuda if torch.device(device).type == 'cuda' else on_cpu


# Standard operators of other packages. Each function gives one for a device, or raises what the
# package raises where it is not installed or cannot run there. benchmarks/peers.py has more.
OTHERS: dict[str, Callable[[str], Operator]] = {'mmcv': mmcv}


def arguments(x: OperatorInputs) -> tuple[Tensor, ...]:
    """As mmcv's: value, level sizes, first token of each level, locations and weights."""
    tokens = x.spatial_shapes.prod(-1)
    locations = x.sampling_locations.to(x.value.dtype)
    return x.value, x.spatial_shapes, tokens.cumsum(0) - tokens, locations, x.attention_weights


def contestants(
    inputs: OperatorInputs, device: str
) -> tuple[dict[tuple[str, str], Operator], dict[str, str]]:
    """(operator, backend) -> function of :class:`OperatorInputs`; what is not there, and why."""
    calls, left_out = {}, {}
    for name, make in OTHERS.items():
        try:
            call = make(device)
            call(inputs)
            calls[STANDARD, name] = call
        except Exception as error:  # another package may fail in any way
            left_out[f'{STANDARD} ({name})'] = str(error).partition('\n')[0]
    wanted = ('reference', _FUSED[torch.device(device).type])
    for operator in (STANDARD, KEY_AWARE):
        for status in ops.backends():
            if status.name in wanted and status.available:
                calls[operator, status.name] = partial(_ours, operator, status.name)
            elif status.name in wanted:
                left_out[f'{operator} ({status.name})'] = status.detail
    return calls, left_out


def _ours(operator: str, backend: str, x: OperatorInputs) -> Tensor:
    where = x.level_sizes, x.sampling_locations
    with ops.use_backend(backend):
        if operator == KEY_AWARE:
            return ops.key_aware_deform_attn(x.query, x.value, x.value, *where)
        return ops.ms_deform_attn(x.value, *where, x.attention_weights)


def _forward(operator: Operator, inputs: Sequence[OperatorInputs]) -> Call:
    return torch.no_grad()(lambda index: operator(inputs[index % len(inputs)]))


def _forward_backward(operator: Operator, inputs: Sequence[OperatorInputs]) -> Call:
    def call(index: int) -> Sequence[Tensor | None]:
        x = inputs[index % len(inputs)]
        names = ('query', 'value', 'sampling_locations', 'attention_weights')
        leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
        output = operator(x._replace(**leaves))
        # The output is its own upstream gradient, which saves making one.
        wanted = list(leaves.values())
        return torch.autograd.grad(output, wanted, output.detach(), allow_unused=True)

    return call


def _bytes(operator: str, x: OperatorInputs) -> int:
    own = x.query if operator == KEY_AWARE else x.attention_weights
    moved = (x.value, x.sampling_locations, own, x.query)  # the output is like the query
    return sum(tensor.numel() * tensor.element_size() for tensor in moved)
