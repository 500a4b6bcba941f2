"""Fused CPU kernels: the C++ of csrc/ behind a plain C interface, loaded with ctypes.

The library knows nothing of torch or Python, so one build serves every version of both. Where it
was not built (no compiler at installation), the backend reports itself unavailable and the
PyTorch formulation takes over. ``docs/kernels-cpu.md`` explains the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import operator

_INTERFACE = 3  # kInterface of csrc/problem.h
_MAX_HEAD_DIM = 256
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_STANDARD, _KEY_AWARE, _SHARED = 0, 1, 2  # Operator of csrc/problem.h
# The operator's tensors in their order, by their names in `Problem`.
_INPUTS = ('query', 'key', 'value', 'reference', 'locations', 'weights')
_WANTED = ('query', 'key', 'value', 'locations', 'weights', 'reference')
_GRADS = {f'grad_{name}': 1 << bit for bit, name in enumerate(_WANTED)}  # Grad of csrc/problem.h
_ISAS = {'baseline': 0, 'avx2': 1, 'avx512': 2}
_SUFFIX = {'darwin': 'dylib', 'win32': 'dll'}.get(sys.platform, 'so')
# Another build of the kernels, a sanitized one for instance, can be named in the environment.
_LIBRARY_PATH = Path(
    os.environ.get('MMLITE_CPU_LIBRARY') or Path(__file__).with_name(f'libmmlite_cpu.{_SUFFIX}')
)


class _Rows(ctypes.Structure):
    """``Rows`` of csrc/problem.h."""

    _fields_ = [
        ('data', ctypes.c_void_p),
        ('batch_stride', ctypes.c_int64),
        ('row_stride', ctypes.c_int64),
        ('head_stride', ctypes.c_int64),
    ]


_ROWS = (
    *('query', 'key', 'value', 'locations', 'weights', 'output'),
    *('grad_output', 'grad_query', 'grad_key', 'grad_value', 'grad_locations', 'grad_weights'),
    *('reference', 'grad_reference'),
)


class _Problem(ctypes.Structure):
    """``Problem`` of csrc/problem.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('batch', 'tokens', 'queries', 'heads', 'dim')),
        *((name, ctypes.c_int64) for name in ('levels', 'points')),
        ('spatial_shapes', ctypes.c_void_p),
        *((name, _Rows) for name in _ROWS),
        *((name, ctypes.c_int64) for name in ('reference_batch', 'offset_levels')),
        *((name, ctypes.c_int32) for name in ('op', 'dtype', 'point_dtype', 'grads')),
        *((name, ctypes.c_int32) for name in ('isa', 'threads', 'sampling')),
    ]


# The same, filled at once: field by field takes ten times as long.
_pack = struct.Struct(f'@7qP{"Pqqq" * len(_ROWS)}2q7i0q').pack


def _load() -> tuple[Any, str]:
    """The library or None, and the reason why there is none."""
    if not _LIBRARY_PATH.exists():
        return None, (
            'the kernels were not compiled at installation; '
            'install a C++ compiler (GCC or Clang) and reinstall mmlite'
        )
    try:
        kernels = ctypes.CDLL(str(_LIBRARY_PATH))
    except OSError as error:
        return None, f'the kernels cannot be loaded: {error}'
    # A library that an older source tree left behind would compute nonsense.
    if not hasattr(kernels, 'mmlite_interface') or kernels.mmlite_interface() != _INTERFACE:
        return None, 'the kernels were compiled from another version; build or install mmlite again'
    for name in ('mmlite_forward', 'mmlite_backward'):
        getattr(kernels, name).argtypes = [ctypes.POINTER(_Problem)]
    kernels.mmlite_set_openmp.argtypes = [ctypes.c_void_p]
    kernels.mmlite_set_openmp(_openmp_of_torch())
    return kernels, ''


def _openmp_of_torch() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch itself is linked to.

    Looked up through torch's library, it is found in torch's own dependencies, whatever other
    copies of the runtime the process holds: the kernels then share torch's pool of threads.
    """
    try:
        torch_cpu = ctypes.CDLL(
            str(Path(torch.__file__).parent / 'lib' / f'libtorch_cpu.{_SUFFIX}')
        )
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


_kernels, _why_not = _load()


class _Choice(threading.local):
    """The instruction set that a thread has chosen."""

    isa: int = _kernels.mmlite_best_isa() if _kernels else _ISAS['baseline']


_choice = _Choice()


def status() -> tuple[bool, str]:
    """Whether the kernels run here, and what runs or why not."""
    if _kernels is None:
        return False, _why_not
    name = next(name for name, code in _ISAS.items() if code == _choice.isa)
    return True, f'{name} kernels on {torch.get_num_threads()} threads'


def why_not(value: Tensor, levels: int) -> str:
    """Why this backend refuses ``value`` with so many levels, or ''."""
    if _kernels is None:
        return _why_not
    if value.device.type != 'cpu':
        return f'it runs on the CPU, and value is on {value.device}'
    if value.dtype not in _DTYPES:
        return f'it has no kernels for {value.dtype}'
    if value.dim() == 4 and value.shape[3] > _MAX_HEAD_DIM:
        return f'it serves heads of up to {_MAX_HEAD_DIM} numbers, and these have {value.shape[3]}'
    return ''


def isas() -> list[str]:
    """The instruction sets this machine can run, from the plainest to the best."""
    if _kernels is None:
        return []
    return [name for name, code in _ISAS.items() if code <= _kernels.mmlite_best_isa()]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set inside the ``with`` block, for tests and benchmarks.

    Float64 always runs the baseline.

    Args:
        name (str): One of :func:`isas`.

    Raises:
        ValueError: This machine has no such instruction set.
    """
    if name not in isas():
        raise ValueError(f'isa must be one of {", ".join(isas())} here; got {name!r}')
    previous, _choice.isa = _choice.isa, _ISAS[name]
    try:
        yield
    finally:
        _choice.isa = previous


def _rows(tensor: Tensor | None) -> tuple[int, ...]:
    if tensor is None:
        return 0, 0, 0, 0
    batch, row, head, *_ = tensor.stride()
    return tensor.data_ptr(), batch, row, head


def _packed(tensor: Tensor) -> Tensor:
    """A copy where the kernels could not step through all but the first three dimensions."""
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for size, stride in zip(reversed(tensor.shape[3:]), reversed(tensor.stride()[3:])):
        if stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _problem(rows: Mapping[str, Tensor], spatial_shapes: Sequence[int]) -> _Problem:
    """Describe a call. The problem does not keep the tensors alive: the caller does.

    ``rows`` holds what the call has of ``_ROWS``. With a reference, ``locations`` are offsets from
    it. The gradients among them are those that the backward pass computes.
    """
    value, locations, reference = rows['value'], rows['locations'], rows.get('reference')
    batch, tokens, heads, dim = value.shape
    _, queries, _, offset_levels, points, _ = locations.shape
    sampling, reference_batch = 0, 0
    if reference is not None:
        sampling, reference_batch = reference.shape[3] // 2, reference.shape[0]
    op = _STANDARD if 'weights' in rows else _KEY_AWARE if 'key' in rows else _SHARED
    grads = sum(_GRADS.get(name, 0) for name in rows)
    sizes = _sizes(tuple(spatial_shapes))
    numbers: list[int] = [batch, tokens, queries, heads, dim, len(spatial_shapes) // 2, points]
    numbers.append(ctypes.addressof(sizes))
    for name in _ROWS:
        numbers += _rows(rows.get(name))
    numbers += [reference_batch, offset_levels]
    numbers += [op, _DTYPES[value.dtype], _DTYPES[locations.dtype], grads]
    numbers += [_choice.isa, torch.get_num_threads(), sampling]
    problem = _Problem.from_buffer_copy(_pack(*numbers))
    problem.sizes = sizes
    return problem


@functools.lru_cache(maxsize=256)
def _sizes(spatial_shapes: tuple[int, ...]) -> ctypes.Array:
    return (ctypes.c_int64 * len(spatial_shapes))(*spatial_shapes)


def _run(function: Callable[[_Problem], int], problem: _Problem) -> None:
    status = function(problem)
    if status == 3:
        raise ValueError(
            f'value has too many tokens for the CPU kernels: {problem.tokens} of {problem.dim} '
            "numbers a head; use_backend('reference') takes them"
        )
    if status == 4:
        raise MemoryError('no memory for the scratch space of deformable attention')
    if status:
        raise RuntimeError('the CPU kernels refuse a call that does not fit together')


def _inputs(query, key, value, reference_points, sampling, attention_weights) -> dict[str, Tensor]:
    """The tensors of a call, by their names in ``Problem``, as the kernels read them."""
    if value.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(f"{why_not(value, 0)}; use_backend('reference') takes them")
    if attention_weights is not None and attention_weights.dtype != sampling.dtype:
        dtype = torch.promote_types(attention_weights.dtype, sampling.dtype)
        sampling, attention_weights = sampling.to(dtype), attention_weights.to(dtype)
    if reference_points is not None:
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        reference_points = reference_points.to(dtype)
    tensors = (query, key, value, reference_points, sampling, attention_weights)
    return {name: _packed(tensor) for name, tensor in zip(_INPUTS, tensors) if tensor is not None}


def forward(*arguments: Any) -> Tensor:
    """The operator; see :mod:`mmlite.ops.operator`."""
    rows = _inputs(*operator.tensors_of(arguments))
    value, shape = rows['value'], rows['locations'].shape
    rows['output'] = output = value.new_empty(*shape[:3], value.shape[3])
    _run(_kernels.mmlite_forward, _problem(rows, arguments[3]))
    return output.flatten(2)


def backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of the operator's tensors in their order, empty where not wanted."""
    tensors = operator.tensors_of(arguments)
    rows = _inputs(*tensors)
    wanted = {name for name, is_wanted in zip(_INPUTS, arguments[-1]) if is_wanted}
    grads = {name: row.new_empty(row.shape) for name, row in rows.items() if name in wanted}
    if grads:
        shape = (*rows['locations'].shape[:3], rows['value'].shape[3])
        rows['grad_output'] = _packed(grad_output.reshape(shape))
        rows |= {f'grad_{name}': grad for name, grad in grads.items()}
        _run(_kernels.mmlite_backward, _problem(rows, arguments[3]))
    return tuple(
        grads[name].to(tensor.dtype) if name in grads else grad_output.new_empty(0)
        for name, tensor in zip(_INPUTS, tensors)
    )


if _kernels is not None:
    operator.implement('CPU', forward, backward)
