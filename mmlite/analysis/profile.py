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
