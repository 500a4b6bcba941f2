"""``mmlite benchmark ops``: every backend of the operators against PyTorch and other packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from .inputs import OperatorInputs, operator_inputs, pyramid_sizes
from .report import Report, Table, mebibytes, milliseconds, size, timing_columns
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
_HUB_KERNEL = 'kernels-community/deformable-detr'


@dataclass(frozen=True)
class Shape:
    """What the operators are measured on; see :func:`~mmlite.analysis.inputs.operator_inputs`."""

    image_size: tuple[int, int] = (800, 1333)
    batch_size: int = 1
    num_queries: int | None = None
    num_heads: int = 8
    head_dim: int = 32
    num_points: int = 4
    locations: str = 'grid'
    dtype: torch.dtype = torch.float32
    device: str = 'cpu'

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    @property
    def num_tokens(self) -> int:
        return sum(h * w for h, w in pyramid_sizes(self.image_size))

    def inputs(self, seed: int = 0) -> OperatorInputs:
        own = dict(self.__dict__)
        return operator_inputs(pyramid_sizes(own.pop('image_size')), **own, seed=seed)


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
    # Forward: every input read once and the output written once, in bytes a second.
    bandwidth: float | None


def report(
    shape: Shape, passes: Sequence[str], rounds: int, warmup: int, scaling: bool, start: Start
) -> Report:
    """All that ``mmlite benchmark ops`` measures; arguments as below."""
    results, left_out = benchmark_operators(
        shape, passes=passes, rounds=rounds, warmup=warmup, start=start
    )
    copy = copy_bandwidth(shape.device)
    curves = []
    if scaling:
        axes = _axes(shape)
        step = start('scaling', sum(map(len, axes.values())))
        for axis, values in axes.items():
            curves.append(benchmark_scaling(shape, axis, values, rounds=rounds, on_step=step))
    return Report(
        settings={**asdict(shape), 'dtype': str(shape.dtype)[len('torch.') :], 'rounds': rounds},
        results=results,
        tables=[*_tables(shape, results, copy), *map(_scaling_table, curves)],
        notes=[f'Not measured: {name}: {reason}.' for name, reason in left_out.items()],
        further={
            'copy_bandwidth': copy,
            'scaling': [point for curve in curves for point in curve],
            'left_out': left_out,
        },
    )


def benchmark_operators(
    shape: Shape,
    *,
    passes: Sequence[str] = PASSES,
    rounds: int = 10,
    warmup: int = 2,
    start: Start = silent,
) -> tuple[list[OperatorResult], dict[str, str]]:
    """Measure every backend that runs on the device, all in the same rounds.

    Args:
        shape (Shape): What to run on.
        passes (Sequence[str]): Of :data:`PASSES`.
        rounds (int): Measurements of each contestant.
        warmup (int): Calls before.
        start (Start): Shows progress.

    Returns:
        tuple[list[OperatorResult], dict[str, str]]: The results, and why others were left out.
    """
    # Rotating inputs: a GPU would otherwise find the last call's in its cache.
    inputs = [shape.inputs(seed) for seed in range(4 if shape.device_type == 'cuda' else 1)]
    setting = Setting(rounds=rounds, warmup=warmup, device=shape.device)
    operators, left_out = contestants(inputs[0], shape.device)
    results = []
    for direction in passes:
        make = _forward if direction == 'forward' else _forward_backward
        calls = {name: make(operator, inputs) for name, operator in operators.items()}
        timings = measure(calls, setting, start, f'operators, {direction}', min_seconds=0.02)
        mmcv = timings.get((STANDARD, 'mmcv'))
        for (operator, backend), timing in timings.items():
            moved = _compulsory_bytes(operator, inputs[0])
            results.append(
                OperatorResult(
                    operator,
                    backend,
                    direction,
                    timing,
                    over_reference=speedup(timings[operator, 'reference'], timing),
                    over_mmcv=speedup(mmcv, timing) if mmcv else None,
                    peak_memory=peak_memory(calls[operator, backend], shape.device),
                    bandwidth=moved / timing.median if direction == 'forward' else None,
                )
            )
    return results, left_out


def benchmark_scaling(
    shape: Shape,
    axis: str,
    values: Sequence,
    *,
    rounds: int = 10,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict]:
    """How the time of a forward pass grows with ``image_size``, ``num_queries`` or ``threads``.

    Returns:
        list[dict]: One entry a value: ``axis``, ``value``, ``tokens`` and the median ``seconds``
        of each contestant. Plain PyTorch is left out where there is a fused backend.
    """
    curve = []
    setting = Setting(rounds=rounds, warmup=1, device=shape.device)
    for value in values:
        point = shape if axis == 'threads' else replace(shape, **{axis: value})
        inputs = point.inputs()
        operators, _ = contestants(inputs, point.device)
        fused = any(backend == _FUSED[point.device_type] for _, backend in operators)
        calls = {
            f'{operator} ({backend})': _forward(call, [inputs])
            for (operator, backend), call in operators.items()
            if not (fused and backend == 'reference')
        }
        with num_threads(value if axis == 'threads' else None):
            timings = measure(calls, setting, min_seconds=0.01)
        seconds = {name: timing.median for name, timing in timings.items()}
        tokens = point.num_tokens
        curve.append({'axis': axis, 'value': value, 'tokens': tokens, 'seconds': seconds})
        on_step()
    return curve


def _axes(shape: Shape) -> dict[str, list]:
    """What ``--scaling`` varies."""
    height, width = shape.image_size
    tokens = shape.num_tokens
    axes = {
        'image_size': [(height * s // 4, width * s // 4) for s in (2, 3, 4, 5)],
        'num_queries': [*(n for n in (300, 900, 3000, 10000) if n < tokens), tokens],
    }
    if shape.device_type == 'cpu':
        most = torch.get_num_threads()
        axes['threads'] = sorted({1, *(n for n in (2, 4, 8, 16, 32) if n < most), most})
    return axes


def copy_bandwidth(device: str, num_bytes: int = 2**28) -> float:
    """Bytes a second that a plain copy on the device moves, reading and writing counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    setting = Setting(rounds=20, device=device)
    timing = measure({'copy': lambda index: target.copy_(source)}, setting)['copy']
    return 2 * num_bytes / timing.median


# ---------------------------------------------------------------- contestants


def mmcv(device: str) -> Operator:
    """mmcv's: compiled on CUDA, grid_sample on the CPU."""
    from mmcv.ops import multi_scale_deform_attn as mmcv

    def on_cuda(x: OperatorInputs) -> Tensor:
        return mmcv.MultiScaleDeformableAttnFunction.apply(*_arguments(x), len(x.value))

    def on_cpu(x: OperatorInputs) -> Tensor:
        value, shapes, _, locations, weights = _arguments(x)
        return mmcv.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    return on_cuda if torch.device(device).type == 'cuda' else on_cpu


def deformops(device: str) -> Operator:
    """deformops' by its own choice: Triton or CUDA on a GPU, grid_sample on the CPU."""
    from deformops.registry import msda

    return lambda x: msda(*_arguments(x))


def hugging_face(device: str) -> Operator:
    """The CUDA kernel that transformers takes from Hugging Face's hub, if it is in the cache."""
    if torch.device(device).type != 'cuda':
        raise RuntimeError('it runs on CUDA')
    from kernels import get_local_kernel, install_kernel

    kernel = get_local_kernel(install_kernel(_HUB_KERNEL, revision='main', local_files_only=True))

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return kernel.ms_deform_attn_forward(*args, len(args[0]))

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_output):
            args = ctx.saved_tensors
            value, locations, weights = kernel.ms_deform_attn_backward(
                *args, grad_output.contiguous(), len(args[0])
            )
            return value, None, None, locations, weights

    return lambda x: Attention.apply(*_arguments(x))


# Each returns an operator for a device, or raises what the other package raises where it is not
# installed or cannot run there.
OTHERS = {'mmcv': mmcv, 'deformops': deformops, 'Hugging Face': hugging_face}


def _arguments(x: OperatorInputs) -> tuple[Tensor, ...]:
    """Value, level sizes, first token of each level, locations and weights, all of one dtype."""
    tokens = x.spatial_shapes.prod(-1)
    starts = tokens.cumsum(0) - tokens
    locations = x.sampling_locations.to(x.value.dtype)
    return x.value, x.spatial_shapes, starts, locations, x.attention_weights


def contestants(
    inputs: OperatorInputs, device: str
) -> tuple[dict[tuple[str, str], Operator], dict[str, str]]:
    """(operator, backend) -> function of :class:`OperatorInputs`; what is not there, and why."""
    calls, left_out = {}, {}
    for name, make in OTHERS.items():
        try:
            calls[STANDARD, name] = make(device)
            calls[STANDARD, name](inputs)
        except Exception as error:  # another package may fail in any way
            calls.pop((STANDARD, name), None)
            left_out[f'{STANDARD} ({name})'] = str(error).partition('\n')[0]
    wanted = ('reference', _FUSED[torch.device(device).type])
    for operator, call in ((STANDARD, _standard), (KEY_AWARE, _key_aware)):
        for status in ops.backends():
            if status.name in wanted and status.available:
                calls[operator, status.name] = partial(call, status.name)
            elif status.name in wanted:
                left_out[f'{operator} ({status.name})'] = status.detail
    return calls, left_out


def _standard(backend: str, x: OperatorInputs) -> Tensor:
    with ops.use_backend(backend):
        return ops.ms_deform_attn(x.value, x.level_sizes, x.sampling_locations, x.attention_weights)


def _key_aware(backend: str, x: OperatorInputs) -> Tensor:
    with ops.use_backend(backend):
        return ops.key_aware_deform_attn(
            x.query, x.value, x.value, x.level_sizes, x.sampling_locations
        )


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


def _compulsory_bytes(operator: str, x: OperatorInputs) -> int:
    own = x.query if operator == KEY_AWARE else x.attention_weights
    read = [x.value, x.sampling_locations, own]
    return sum(t.numel() * t.element_size() for t in [*read, x.query])  # output is like query


# ---------------------------------------------------------------- tables


def _tables(shape: Shape, results: Sequence[OperatorResult], copy: float) -> list[Table]:
    """One for each direction; ``copy`` is the device's bandwidth."""

    def bandwidth(result: OperatorResult) -> str:
        if result.bandwidth is None:
            return '-'
        return f'{result.bandwidth / 1e9:.2f} ({result.bandwidth / copy:.1%})'

    title = (
        f'{size(shape.image_size)} ({shape.num_queries or shape.num_tokens} queries, '
        f'{shape.num_tokens} tokens), '
        f'batch {shape.batch_size}, M {shape.num_heads}, D {shape.head_dim}, '
        f'P {shape.num_points}, {str(shape.dtype)[len("torch.") :]}, {shape.locations} locations'
    )
    columns = {
        'operator': lambda r: r.operator,
        'backend': lambda r: r.backend,
        **timing_columns(lambda r: r.timing),
        'over PyTorch': lambda r: r.over_reference,
        'over mmcv standard': lambda r: r.over_mmcv or '-',
        'peak MiB': lambda r: mebibytes(r.peak_memory),
        'GB/s (of a copy)': bandwidth,
    }
    return [
        Table.of(f'{way}, {title}', [r for r in results if r.direction == way], columns)
        for way in dict.fromkeys(result.direction for result in results)
    ]


def _scaling_table(curve: Sequence[Mapping[str, Any]]) -> Table:
    """One curve of :func:`benchmark_scaling`."""
    axis = curve[0]['axis'].replace('_', ' ')

    def value(point: Mapping[str, Any]) -> object:
        return size(point['value']) if isinstance(point['value'], tuple) else point['value']

    times = {
        name: lambda point, name=name: milliseconds(point['seconds'][name])
        for name in curve[0]['seconds']
    }
    columns = {axis: value, 'tokens': lambda point: point['tokens'], **times}
    return Table.of(f'Forward, median ms, by {axis}', curve, columns)
