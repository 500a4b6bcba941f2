"""``mmlite benchmark ops``: every backend of the operators against plain PyTorch and mmcv."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .inputs import OperatorInputs, OperatorShape
from .report import Report, time_tables
from .timing import Call, Contestant, Setting, Start, silent, take_turns

STANDARD, KEY_AWARE = 'ms_deform_attn', 'key_aware_deform_attn'
PASSES = ('forward', 'forward+backward')


def benchmark_operators(setting: Setting, start: Start = silent, **options: Any) -> Report:
    """Measure every backend that runs on the device; notes say why one was left out.

    The parts of the setting are of :data:`PASSES`; the options are those of ``OperatorShape``.
    """
    if len(setting.batch_sizes) > 1:
        raise ValueError('ops takes one --batch-size; run it once for each')
    options |= {'dtype': getattr(torch, setting.dtype), 'device': setting.device}
    shape = OperatorShape(setting.image_size, *setting.batch_sizes, **options)
    # Rotating inputs: a GPU would otherwise find the last call's in its cache.
    inputs = [shape.inputs(seed) for seed in range(1 if shape.device == 'cpu' else 4)]
    operators, left_out = contestants(inputs, shape.device)
    by_name = {(each.operator, each.backend): each for each in operators}
    against = {
        'over PyTorch': lambda each: by_name[each.operator, 'reference'],
        'over mmcv standard': lambda each: by_name.get((STANDARD, 'mmcv')),
    }
    take_turns(operators, setting, start, against=against, min_seconds=0.02)
    sizes = f'M {shape.num_heads}, D {shape.head_dim}, P {shape.num_points}'
    tokens = f'{shape.num_queries or shape.num_tokens} queries, {shape.num_tokens} tokens'
    what = f'{tokens}, {sizes}, {shape.locations} locations'
    notes = [f'Not measured: {name}: {reason}.' for name, reason in left_out.items()]
    settings = {**asdict(setting), **asdict(shape), 'dtype': setting.dtype}
    return Report(settings, operators, time_tables(operators, setting, what), notes)


# What runs one operator, standard or key-aware.
Operator = Callable[[OperatorInputs], Tensor]


@dataclass(eq=False)
class OperatorOnBackend(Contestant):
    """An operator on one backend."""

    operator: str  # ms_deform_attn or key_aware_deform_attn
    backend: str  # reference, cpu, triton, or one of OTHERS
    run: Operator
    inputs: Sequence[OperatorInputs]

    def label(self) -> dict[str, str]:
        return {'operator': self.operator, 'backend': self.backend}

    def call(self, part: str, setting: Setting | None = None, batch_size: int = 1) -> Call:
        def forward(index: int) -> Tensor:
            with torch.no_grad():
                return self.run(self.inputs[index % len(self.inputs)])

        def forward_backward(index: int) -> Sequence[Tensor | None]:
            x = self.inputs[index % len(self.inputs)]
            names = ('query', 'value', 'sampling_locations', 'attention_weights')
            leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
            output = self.run(x._replace(**leaves))
            # The output is its own upstream gradient, which saves making one.
            wanted = list(leaves.values())
            return torch.autograd.grad(output, wanted, output.detach(), allow_unused=True)

        return forward if part == 'forward' else forward_backward

    def work(self, part: str, batch_size: int) -> dict[str, float]:
        """Bytes of all inputs and the output of a forward pass, each once."""
        x = self.inputs[0]
        own = x.query if self.operator == KEY_AWARE else x.attention_weights
        moved = (x.value, x.sampling_locations, own, x.query)  # the output is like the query
        return {'GB/s': sum(t.nbytes for t in moved) / 1e9} if part == 'forward' else {}


def mmcv(device: str) -> Operator:
    """mmcv's standard operator: compiled on CUDA, grid_sample on the CPU."""
    from mmcv.ops import multi_scale_deform_attn as mmcv

    def run(x: OperatorInputs) -> Tensor:
        value, shapes, starts, *sampling = arguments(x)
        if torch.device(device).type == 'cuda':
            operator = mmcv.MultiScaleDeformableAttnFunction
            return operator.apply(value, shapes, starts, *sampling, len(value))
        return mmcv.multi_scale_deformable_attn_pytorch(value, shapes, *sampling)

    return run


# Standard operators of other packages: makes one for a device, or raises what the package raises.
# benchmarks/peers.py has more.
OTHERS: dict[str, Callable[[str], Operator]] = {'mmcv': mmcv}


def arguments(x: OperatorInputs) -> tuple[Tensor, ...]:
    """As mmcv's: value, level sizes, first token of each level, locations and weights."""
    tokens = x.spatial_shapes.prod(-1)
    locations = x.sampling_locations.to(x.value.dtype)
    return x.value, x.spatial_shapes, tokens.cumsum(0) - tokens, locations, x.attention_weights


def contestants(
    inputs: Sequence[OperatorInputs], device: str
) -> tuple[list[OperatorOnBackend], dict[str, str]]:
    """What runs on a device; and what does not, and why."""
    found: dict[tuple[str, str], Operator] = {}
    left_out = {}
    for name, make in OTHERS.items():
        try:
            run = make(device)
            run(inputs[0])
            found[STANDARD, name] = run
        except Exception as error:  # another package may fail in any way
            left_out[f'{STANDARD} ({name})'] = str(error).partition('\n')[0]
    wanted = ('reference', 'triton' if torch.device(device).type == 'cuda' else 'cpu')
    statuses = [status for status in ops.backends() if status.name in wanted]
    for operator, status in itertools.product((STANDARD, KEY_AWARE), statuses):
        if status.available:
            found[operator, status.name] = partial(_ours, operator, status.name)
        else:
            left_out[f'{operator} ({status.name})'] = status.detail
    return [OperatorOnBackend(*name, run, inputs) for name, run in found.items()], left_out


def _ours(operator: str, backend: str, x: OperatorInputs) -> Tensor:
    where = x.level_sizes, x.sampling_locations
    with ops.use_backend(backend):
        if operator == KEY_AWARE:
            return ops.key_aware_deform_attn(x.query, x.value, x.value, *where)
        return ops.ms_deform_attn(x.value, *where, x.attention_weights)
