"""The operators of deformable attention, every backend against PyTorch and mmcv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .. import ops
from .inputs import OperatorInputs, level_sizes, operator_inputs
from .latency import Call, Ratio, Timing, measure, measurements, num_threads, speedup
from .memory import peak_memory
from .report import Table, mebibytes, milliseconds, timing_cells

STANDARD, KEY_AWARE = 'ms_deform_attn', 'key_aware_deform_attn'
PASSES = ('forward', 'forward+backward')
_FUSED = {'cpu': 'cpu', 'cuda': 'triton'}


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

    def inputs(self, seed: int = 0) -> OperatorInputs:
        return operator_inputs(
            level_sizes(self.image_size),
            batch_size=self.batch_size,
            num_queries=self.num_queries,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_points=self.num_points,
            locations=self.locations,
            dtype=self.dtype,
            device=self.device,
            seed=seed,
        )


@dataclass(frozen=True)
class OperatorResult:
    """One operator on one backend.

    Attributes:
        operator (str): ``ms_deform_attn`` or ``key_aware_deform_attn``.
        backend (str): ``mmcv``, ``reference``, ``cpu`` or ``triton``.
        direction (str): ``forward`` or ``forward+backward``.
        timing (Timing): Seconds of a call.
        over_reference (Ratio): How many times faster than the same operator in plain PyTorch.
        over_mmcv (Ratio | None): How many times faster than mmcv's ``ms_deform_attn``.
        peak_memory (int | None): Bytes beyond the inputs.
        bandwidth (float | None): Forward: every input read once and the output written once,
            over the time, in bytes a second.
    """

    operator: str
    backend: str
    direction: str
    timing: Timing
    over_reference: Ratio
    over_mmcv: Ratio | None
    peak_memory: int | None
    bandwidth: float | None

    def as_json(self) -> dict:
        return {**asdict(self), 'timing': self.timing.as_json()}


def benchmark_operators(
    shape: Shape,
    *,
    passes: Sequence[str] = PASSES,
    rounds: int = 10,
    warmup: int = 2,
    start: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> tuple[list[OperatorResult], dict[str, str]]:
    """Measure every backend that runs on the device, all in the same rounds.

    Args:
        shape (Shape): What to run on.
        passes (Sequence[str]): Of :data:`PASSES`.
        rounds (int): Measurements of each contestant.
        warmup (int): Calls before.
        start (Callable): Called with the number of steps ahead; returns what to call after each.

    Returns:
        tuple[list[OperatorResult], dict[str, str]]: The results, and for what was left out the
        reason.
    """
    # Rotating inputs: a GPU would otherwise find the last call's in its cache.
    inputs = [shape.inputs(seed) for seed in range(4 if _on_gpu(shape) else 1)]
    calls, left_out = _calls(inputs[0], shape.device)
    results = []
    for direction in passes:
        contestants = {name: _contestant(call, inputs, direction) for name, call in calls.items()}
        timings = measure(
            contestants,
            rounds=rounds,
            warmup=warmup,
            min_seconds=0.02,
            device=shape.device,
            on_step=start(measurements(len(contestants), rounds)),
        )
        mmcv = timings.get((STANDARD, 'mmcv'))
        for (operator, backend), timing in timings.items():
            contestant = contestants[operator, backend]
            moved = _compulsory_bytes(operator, inputs[0])
            results.append(
                OperatorResult(
                    operator,
                    backend,
                    direction,
                    timing,
                    speedup(timings[operator, 'reference'], timing),
                    speedup(mmcv, timing) if mmcv else None,
                    peak_memory(lambda call=contestant: call(0), shape.device),
                    moved / timing.median if direction == 'forward' else None,
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
    """How the time of a forward pass grows with one quantity.

    Args:
        shape (Shape): What stays the same.
        axis (str): ``image_size``, ``num_queries`` or ``threads``.
        values (Sequence): The values of that quantity.
        rounds (int): Measurements of each contestant at each value.
        on_step (Callable[[], None]): Called after each value.

    Returns:
        list[dict]: One entry a value: ``axis``, ``value``, ``tokens`` and the median ``seconds``
        of each contestant. Plain PyTorch is left out where there is a fused backend.
    """
    curve = []
    for value in values:
        changed = {} if axis == 'threads' else {axis: value}
        point = Shape(**{**shape.__dict__, **changed})
        inputs = point.inputs()
        calls, _ = _calls(inputs, point.device)
        if any(backend == _FUSED[_device_type(point)] for _, backend in calls):
            calls = {name: call for name, call in calls.items() if name[1] != 'reference'}
        contestants = {name: _contestant(call, [inputs], PASSES[0]) for name, call in calls.items()}
        with num_threads(value if axis == 'threads' else None):
            timings = measure(
                contestants, rounds=rounds, warmup=1, min_seconds=0.01, device=point.device
            )
        curve.append(
            {
                'axis': axis,
                'value': value,
                'tokens': inputs.value.shape[1],
                'seconds': {f'{op} ({name})': t.median for (op, name), t in timings.items()},
            }
        )
        on_step()
    return curve


def copy_bandwidth(device: str, num_bytes: int = 2**28) -> float:
    """Bytes a second that a plain copy on the device moves, reading and writing counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    timing = measure({'copy': lambda index: target.copy_(source)}, rounds=20, device=device)
    return 2 * num_bytes / timing['copy'].median


def _calls(inputs: OperatorInputs, device: str) -> tuple[dict, dict[str, str]]:
    """(operator, backend) -> function of :class:`OperatorInputs`, and what is not there."""
    calls, left_out = {}, {}
    try:
        mmcv = _mmcv_operator(device)
        mmcv(inputs)
        calls[STANDARD, 'mmcv'] = mmcv
    except (ImportError, RuntimeError, AttributeError) as error:
        left_out[f'{STANDARD} (mmcv)'] = str(error).partition('\n')[0]
    wanted = ('reference', _FUSED[torch.device(device).type])
    for operator in (STANDARD, KEY_AWARE):
        for status in ops.backends():
            if status.name not in wanted:
                continue
            if status.available:
                calls[operator, status.name] = _on_backend(status.name, operator)
            else:
                left_out[f'{operator} ({status.name})'] = status.detail
    return calls, left_out


def _on_backend(backend: str, operator: str) -> Callable[[OperatorInputs], Tensor]:
    def standard(x: OperatorInputs) -> Tensor:
        with ops.use_backend(backend):
            return ops.ms_deform_attn(
                x.value, x.spatial_shapes, x.sampling_locations, x.attention_weights
            )

    def key_aware(x: OperatorInputs) -> Tensor:
        with ops.use_backend(backend):
            return ops.key_aware_deform_attn(
                x.query, x.value, x.value, x.spatial_shapes, x.sampling_locations
            )

    return standard if operator == STANDARD else key_aware


def _mmcv_operator(device: str) -> Callable[[OperatorInputs], Tensor]:
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    def on_cuda(x: OperatorInputs) -> Tensor:
        tokens = x.spatial_shapes.prod(-1)
        return MultiScaleDeformableAttnFunction.apply(
            x.value,
            x.spatial_shapes,
            tokens.cumsum(0) - tokens,
            x.sampling_locations.to(x.value.dtype),
            x.attention_weights,
            64,
        )

    def on_cpu(x: OperatorInputs) -> Tensor:
        return multi_scale_deformable_attn_pytorch(
            x.value, x.spatial_shapes, x.sampling_locations.to(x.value.dtype), x.attention_weights
        )

    return on_cuda if torch.device(device).type == 'cuda' else on_cpu


def _contestant(
    call: Callable[[OperatorInputs], Tensor], inputs: Sequence[OperatorInputs], direction: str
) -> Call:
    if direction == 'forward':

        def forward(index: int) -> Tensor:
            with torch.no_grad():
                return call(inputs[index % len(inputs)])

        return forward

    leaves = [
        OperatorInputs(*(t.detach().requires_grad_(t.is_floating_point()) for t in x))
        for x in inputs
    ]

    def forward_backward(index: int) -> Sequence[Tensor | None]:
        x = leaves[index % len(leaves)]
        output = call(x)
        # The output is its own upstream gradient, which saves making one.
        wanted = [t for t in x if t.requires_grad]
        return torch.autograd.grad(output, wanted, output.detach(), allow_unused=True)

    return forward_backward


def _compulsory_bytes(operator: str, x: OperatorInputs) -> int:
    own = x.query if operator == KEY_AWARE else x.attention_weights
    read = [x.value, x.sampling_locations, own]
    return sum(t.numel() * t.element_size() for t in [*read, x.query])  # output is like query


def _device_type(shape: Shape) -> str:
    return torch.device(shape.device).type


def _on_gpu(shape: Shape) -> bool:
    return _device_type(shape) == 'cuda'


def tables(shape: Shape, results: Sequence[OperatorResult], copy: float) -> list[Table]:
    """The results for people, one table for each direction; ``copy`` is the device's bandwidth."""
    height, width = shape.image_size
    tokens = sum(h * w for h, w in level_sizes(shape.image_size))
    shown = []
    for direction in dict.fromkeys(result.direction for result in results):
        table = Table(
            f'{direction}, {height}x{width} ({shape.num_queries or tokens} queries, {tokens} '
            f'tokens), batch {shape.batch_size}, M {shape.num_heads}, D {shape.head_dim}, '
            f'P {shape.num_points}, {str(shape.dtype).removeprefix("torch.")}, '
            f'{shape.locations} locations',
            (
                *('operator', 'backend', 'median ms', 'mean ms', 'p95 ms'),
                *('over PyTorch', 'over mmcv standard', 'peak MiB', 'GB/s (of a copy)'),
            ),
        )
        for result in results:
            if result.direction == direction:
                table.rows.append(_row(result, copy))
        shown.append(table)
    return shown


def _row(result: OperatorResult, copy: float) -> list[str]:
    bandwidth = '-'
    if result.bandwidth is not None:
        bandwidth = f'{result.bandwidth / 1e9:.2f} ({result.bandwidth / copy:.1%})'
    return [
        result.operator,
        result.backend,
        *timing_cells(result.timing),
        str(result.over_reference),
        str(result.over_mmcv or '-'),
        mebibytes(result.peak_memory),
        bandwidth,
    ]


def scaling_table(curve: Sequence[dict]) -> Table:
    """One curve of :func:`benchmark_scaling` for people."""
    names = list(curve[0]['seconds'])
    axis = curve[0]['axis']
    table = Table(
        f'Forward, median ms, by {axis.replace("_", " ")}',
        (axis.replace('_', ' '), 'tokens', *names),
    )
    for point in curve:
        value = point['value']
        value = 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
        times = [milliseconds(point['seconds'][name]) for name in names]
        table.rows.append((value, str(point['tokens']), *times))
    return table
