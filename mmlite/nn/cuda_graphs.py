"""CUDA-graph replay for fixed sizes: all kernels of a forward pass launched at once.

At batch 1 the encoder launches hundreds of kernels that take less time than Python takes to launch
them. A graph holds the launches of one call, with the addresses they read and write; it fits calls
of the same sizes alone.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.functional import autocast_dtype


class _Graph(NamedTuple):
    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], None]


class GraphReplay:
    """A function of tensors that is captured into a CUDA graph, one for every size.

    The first call of a size runs without a graph, which also compiles and tunes its kernels; the
    second captures; later ones copy their inputs, replay and copy the output. Weights may be
    written to in place. Where they are replaced (``model.half()``), what was captured is dropped.
    Forward hooks run at the capture, not at the replay.

    A call runs without a graph

    - where gradients are recorded, or the module is in training mode;
    - where a tensor is not on a GPU;
    - where an argument is a function;
    - while PyTorch traces, compiles or captures;
    - where capturing its size has failed before, about which one warning says why.

    Args:
        function (Callable[..., Tensor]): What to run: tensors and hashable arguments in, one tensor
            out. It must not read a value of a tensor.
        module (nn.Module): Whose weights ``function`` uses.
        max_graphs (int): Sizes to hold graphs of; the one not used for longest makes room. They
            share the memory of their activations.
    """

    def __init__(
        self, function: Callable[..., Tensor], module: nn.Module, max_graphs: int = 8
    ) -> None:
        self.function = function
        self.module = module
        self.max_graphs = max_graphs
        self._forget()

    def _forget(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # None: seen once
        self._failed: set[Hashable] = set()
        self._weights: tuple[int, ...] = ()
        self._pool: Any = None

    def __getstate__(self) -> dict:
        """Copies and pickles hold no graphs."""
        copied = GraphReplay(self.function, self.module, self.max_graphs)
        return copied.__dict__

    def __call__(self, *args: object) -> Tensor:
        """What ``function`` returns, a tensor of its own."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not _fits_a_graph(tensors, args, self.module):
            return self.function(*args)
        kept = (*self.module.parameters(), *self.module.buffers())
        weights = tuple(tensor.data_ptr() for tensor in kept)
        if weights != self._weights:
            self._forget()
            self._weights = weights
        key = _key(args)
        if key in self._failed:
            return self.function(*args)
        if key not in self._graphs:
            self._graphs[key] = None
            while len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
            return self.function(*args)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        if graph is None:
            try:
                graph = self._graphs[key] = self._capture(args)
            except RuntimeError as error:
                del self._graphs[key]
                self._failed.add(key)
                reason = str(error).partition('\n')[0]
                warnings.warn(f'runs without a CUDA graph: {reason}', stacklevel=2)
                return self.function(*args)
        with torch.no_grad():
            for held, given in zip(graph.inputs, tensors):
                held.copy_(given)
            graph.replay()
            return graph.output.clone()

    def _capture(self, args: tuple) -> _Graph:
        with torch.inference_mode(False), torch.no_grad():
            held = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            inputs = [arg for arg in held if isinstance(arg, Tensor)]
            call = partial(self.function, *held)
            replay, output, self._pool = _capture(call, inputs[0].device, self._pool)
        return _Graph(inputs, output, replay)


def _fits_a_graph(tensors: list[Tensor], args: tuple, module: nn.Module) -> bool:
    return (
        bool(tensors)
        and not torch.is_grad_enabled()
        and not module.training
        and all(_on_gpu(tensor) for tensor in tensors)
        and not any(callable(arg) for arg in args)
        and not is_tracing()
        and not _is_capturing()
    )


def is_tracing() -> bool:
    """Whether a call is being recorded rather than run."""
    return _is_compiling() or torch.jit.is_tracing()


# torch 2.1 has it elsewhere.
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


def _key(args: tuple) -> Hashable:
    """What a graph is valid for."""
    return autocast_dtype('cuda'), tuple(
        (arg.shape, arg.dtype, arg.device) if isinstance(arg, Tensor) else _frozen(arg)
        for arg in args
    )


def _frozen(argument: object) -> Hashable:
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(item) for item in argument)
    return argument


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _capture(
    function: Callable[[], Tensor], device: torch.device, pool: Any
) -> tuple[Callable[[], None], Tensor, Any]:
    """Capture a call: how to replay it, where it then writes its output, and its memory pool."""
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    dtype = autocast_dtype('cuda')
    # A cast weight that autocast has kept would stay out of the graph, and be freed later.
    autocast = torch.autocast('cuda', dtype, dtype is not None, cache_enabled=False)
    with torch.cuda.device(device), autocast:
        # As PyTorch asks for: libraries set themselves up on the stream of the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            output = function()
    return graph.replay, output, pool
