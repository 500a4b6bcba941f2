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
from .inputs import OperatorInputs, operator_inputs
from .report import Report, time_tables
from .timing import Call, Contestant, Setting, Start, silent, take_turns

STANDARD, KEY_AWARE = 'ms_deform_attn', 'key_aware_deform_attn'
PASSES = ('forward', 'forward+backward')
# What runs one operator, standard or key-aware.
Operator = Callable[[OperatorInputs], Tensor]


def benchmark_operators(setting: Setting, start: Start = silent, **options: Any) -> Report:
    """Measure every backend that runs on the device; notes say why one was left out.

    The parts of the setting are of :data:`PASSES`; the options are those of ``operator_inputs``.
    """
    if len(setting.batch_sizes) > 1:
        raise ValueError('ops takes one --batch-size; run it once for each')
    draw = partial(operator_inputs, setting.image_size, *setting.batch_sizes, **options)
    draw = partial(draw, dtype=getattr(torch, setting.dtype), device=setting.device)
    # Rotating inputs: a GPU would otherwise find the last call's in its cache.
    inputs = [draw(seed=seed) for seed in range(1 if setting.device == 'cpu' else 4)]
    operators, left_out = contestants(inputs, setting.device)
    by_name = {(each.operator, each.backend): each for each in operators}
    against = {
        'over PyTorch': lambda each: by_name[each.operator, 'reference'],
        'over mmcv standard': lambda each: by_name.get((STANDARD, 'mmcv')),
    }
    take_turns(operators, setting, start, against=against, min_seconds=0.02)
    what = '{} queries, {} tokens'.format(*(x.shape[1] for x in inputs[0][:2]))
    notes = [f'Not measured: {name}: {reason}.' for name, reason in left_out.items()]
    settings = {**asdict(setting), **options}
    return Report(settings, operators, time_tables(operators, setting, what), notes)


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


def arguments(x: OperatorInputs) -> tuple[Tensor, ...]:
    """As mmcv's: value, level sizes, first token of each level, locations and weights."""
    tokens = x.spatial_shapes.prod(-1)
    locations = x.sampling_locations.to(x.value.dtype)
    return x.value, x.spatial_shapes, tokens.cumsum(0) - tokens, locations, x.attention_weights


def ours(operator: str, backend: str, device: str) -> Operator:
    """One of our operators on a backend; ValueError where that does not run here."""
    status = next(status for status in ops.backends() if status.name == backend)
    if not status.available:
        raise ValueError(status.detail)

    def run(x: OperatorInputs) -> Tensor:
        where = x.level_sizes, x.sampling_locations
        with ops.use_backend(backend):
            if operator == KEY_AWARE:
                return ops.key_aware_deform_attn(x.query, x.value, x.value, *where)
            return ops.ms_deform_attn(x.value, *where, x.attention_weights)

    return run


# Standard operators of other packages: makes one for a device, or raises what the package raises.
# benchmarks/peers.py has more.
OTHERS: dict[str, Callable[[str], Operator]] = {'mmcv': mmcv}


def contestants(
    inputs: Sequence[OperatorInputs], device: str
) -> tuple[list[OperatorOnBackend], dict[str, str]]:
    """What runs on a device; and what does not, and why."""
    backends = ('reference', 'triton' if torch.device(device).type == 'cuda' else 'cpu')
    wanted = {(STANDARD, name): make for name, make in OTHERS.items()}
    own = itertools.product((STANDARD, KEY_AWARE), backends)
    wanted |= {each: partial(ours, *each) for each in own}
    found, left_out = [], {}
    for (operator, backend), make in wanted.items():
        try:
            run = make(device)
            run(inputs[0])
            found.append(OperatorOnBackend(operator, backend, run, inputs))
        except Exception as error:  # another package may fail in any way
            left_out[f'{operator} ({backend})'] = str(error).partition('\n')[0]
    return found, left_out
