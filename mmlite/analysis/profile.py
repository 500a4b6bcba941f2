"""Where time goes: by kind of operator, and by stage of a detector."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .complexity import FLOP_RULES, MATRIX_PRODUCTS, SAMPLING_OPS

KINDS = ('matrix products', 'sampling', 'rest of attention', 'LayerNorm', 'rest')
_NORMS = {torch.ops.aten.native_layer_norm, torch.ops.aten.native_layer_norm_backward}
_SAMPLING = {
    *SAMPLING_OPS,
    torch.ops.aten.grid_sampler_2d_backward,
    torch.ops.mmlite.key_aware_deform_attn_backward,
    torch.ops.mmlite.ms_deform_attn_backward,
}


@dataclass(frozen=True)
class OpProfile:
    """Time of a call by kind of operator.

    Attributes:
        seconds (dict[str, float]): For each of :data:`KINDS`. Sampling is the fused operator, or
            ``grid_sample`` where plain PyTorch runs, whose other operators are then the rest of
            attention.
        matmul_flops (int): FLOPs of the matrix products.
    """

    seconds: dict[str, float]
    matmul_flops: int

    @property
    def matmul_rate(self) -> float:
        """FLOPs a second that the matrix products reach."""
        return self.matmul_flops / self.seconds['matrix products']

    def share(self, kind: str) -> float:
        """Part of the time, 0 to 1."""
        return self.seconds[kind] / sum(self.seconds.values())


def profile_ops(
    module: nn.Module,
    call: Callable[[int], object],
    attention: tuple[type, ...],
    *,
    repeats: int = 5,
    device: torch.device | str = 'cpu',
) -> OpProfile:
    """Time every operator of a call and add the times up by kind.

    Each operator is timed by itself (on CUDA the device is waited for), which adds some
    microseconds to each; the sum is therefore a little more than the call takes.

    Args:
        module (nn.Module): What runs in ``call``.
        call (Callable[[int], object]): Runs it.
        attention (tuple[type, ...]): Classes of the deformable attention modules.
        repeats (int): Timed runs after one of warm-up; the median of each kind is kept.
        device (torch.device | str): Where it runs.

    Returns:
        OpProfile: Seconds by kind.
    """
    call(0)
    runs = []
    for index in range(repeats):
        timer = _OpTimer(torch.device(device))
        with timer.watch(module, attention), timer:
            call(index)
        runs.append(timer)
    return OpProfile(
        {kind: float(np.median([run.seconds[kind] for run in runs])) for kind in KINDS},
        runs[0].matmul_flops,
    )


class _OpTimer(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.matmul_flops = 0
        self._wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
        self._depth = 0  # in how many attention modules we are

    @contextmanager
    def watch(self, module: nn.Module, attention: tuple[type, ...]) -> Iterator[None]:
        """Follow when an attention module is running."""
        hooks = []
        for child in module.modules():
            if isinstance(child, attention):
                hooks += [
                    child.register_forward_pre_hook(lambda *_: self._step(1)),
                    child.register_forward_hook(lambda *_: self._step(-1)),
                ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _step(self, by: int) -> None:
        self._depth += by

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._wait()
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self._wait()
        elapsed = time.perf_counter() - start
        op = func._overloadpacket
        if op in MATRIX_PRODUCTS:
            self.matmul_flops += FLOP_RULES[op](args, out)
            kind = 'matrix products'
        elif op in _SAMPLING:
            kind = 'sampling'
        elif op in _NORMS:
            kind = 'LayerNorm'
        else:
            kind = 'rest of attention' if self._depth else 'rest'
        self.seconds[kind] += elapsed
        return out


def profile_stages(
    model: nn.Module,
    call: Callable[[int], object],
    *,
    repeats: int = 5,
    device: torch.device | str = 'cpu',
) -> dict[str, float]:
    """Time the stages of a detector.

    Args:
        model (nn.Module): A detector of mmdet.
        call (Callable[[int], object]): Runs it once.
        repeats (int): Timed runs after one of warm-up; the median of each stage is kept.
        device (torch.device | str): Where it runs.

    Returns:
        dict[str, float]: Seconds of ``backbone``, ``neck``, ``encoder``, ``encoder.layers.<i>``
        (part of the encoder), ``decoder``, ``head`` (its branches called from the decoder apart),
        and ``other``: the rest, such as query selection and post-processing.
    """
    stages = {name: getattr(model, name, None) for name in ('backbone', 'neck', 'encoder')}
    stages['decoder'] = getattr(model, 'decoder', None)
    stages['head'] = getattr(model, 'bbox_head', None)
    for index, layer in enumerate(getattr(stages['encoder'], 'layers', ())):
        stages[f'encoder.layers.{index}'] = layer
    stages = {name: child for name, child in stages.items() if isinstance(child, nn.Module)}

    wait = torch.cuda.synchronize if torch.device(device).type == 'cuda' else lambda: None
    spent: dict[str, float] = {}
    started: dict[str, float] = {}

    def enter(name: str) -> Callable:
        def hook(*_: object) -> None:
            wait()
            started[name] = time.perf_counter()

        return hook

    def leave(name: str) -> Callable:
        def hook(*_: object) -> None:
            wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started[name]

        return hook

    hooks = []
    for name, child in stages.items():
        hooks += [
            child.register_forward_pre_hook(enter(name)),
            child.register_forward_hook(leave(name)),
        ]
    runs = []
    try:
        for index in range(repeats + 1):
            spent = {}
            start = time.perf_counter()
            call(index)
            wait()
            total = time.perf_counter() - start
            parts = sum(seconds for name, seconds in spent.items() if '.' not in name)
            runs.append({**spent, 'other': total - parts})
    finally:
        for hook in hooks:
            hook.remove()
    return {name: float(np.median([run[name] for run in runs[1:]])) for name in runs[1]}


def matmul_peak(device: torch.device | str = 'cpu', dtype: torch.dtype = torch.float32) -> float:
    """FLOPs a second (multiply-adds counted as one) of the best of some large matrix products."""
    size = 2048 if torch.device(device).type == 'cpu' else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float('inf')
    for _ in range(10):
        if a.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return size**3 / best
