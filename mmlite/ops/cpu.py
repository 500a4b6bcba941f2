"""Fused CPU kernels: the C++ of csrc/ behind a plain C interface, loaded with ctypes.

The library knows nothing of torch or Python, so one build serves every version of both. Where it
was not built (no compiler at installation), the backend reports itself unavailable and the
PyTorch formulation takes over. ``docs/kernels-cpu.md`` explains the kernels.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import library

_INTERFACE = 2  # kInterface of csrc/problem.h
_MAX_HEAD_DIM = 256
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_OPERATORS = {'standard': 0, 'key aware': 1, 'key aware, shared': 2}
_GRADS = {
    'grad_query': 1,
    'grad_key': 2,
    'grad_value': 4,
    'grad_locations': 8,
    'grad_weights': 16,
}
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


class _Problem(ctypes.Structure):
    """``Problem`` of csrc/problem.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('batch', 'tokens', 'queries', 'heads', 'dim')),
        *((name, ctypes.c_int64) for name in ('levels', 'points')),
        ('spatial_shapes', ctypes.POINTER(ctypes.c_int64)),
        *((name, _Rows) for name in ('query', 'key', 'value', 'locations', 'weights', 'output')),
        *((name, _Rows) for name in ('grad_output', 'grad_query', 'grad_key', 'grad_value')),
        *((name, _Rows) for name in ('grad_locations', 'grad_weights')),
        *((name, ctypes.c_int32) for name in ('op', 'dtype', 'point_dtype', 'grads')),
        *((name, ctypes.c_int32) for name in ('isa', 'threads')),
    ]


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
    """Why this backend does not take a call with such a ``value`` and so many levels, or ''."""
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


def _rows(tensor: Tensor) -> _Rows:
    batch, row, head, *_ = tensor.stride()
    return _Rows(tensor.data_ptr(), batch, row, head)


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


def _points(locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, the wider of the two."""
    if locations.dtype == weights.dtype:
        return _packed(locations), _packed(weights)
    dtype = torch.promote_types(locations.dtype, weights.dtype)
    return _packed(locations.to(dtype)), _packed(weights.to(dtype))


def _problem(
    operator: str, value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, **rows: Tensor
) -> _Problem:
    """Describe a call. The problem does not keep the tensors alive: the caller does.

    The gradients among ``rows`` are those that the backward pass computes.
    """
    _, queries, _, levels, points, _ = locations.shape
    problem = _Problem(*value.shape[:2], queries, *value.shape[2:], levels, points)
    problem.spatial_shapes = (ctypes.c_int64 * len(spatial_shapes))(*spatial_shapes)
    problem.value = _rows(value)
    problem.locations = _rows(locations)
    problem.op = _OPERATORS[operator]
    problem.dtype = _DTYPES[value.dtype]
    problem.point_dtype = _DTYPES[locations.dtype]
    problem.isa = _choice.isa
    problem.threads = torch.get_num_threads()
    for name, tensor in rows.items():
        setattr(problem, name, _rows(tensor))
        problem.grads |= _GRADS.get(name, 0)
    return problem


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


def _refuse_wide_heads(value: Tensor) -> None:
    if value.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(
            f'the CPU kernels serve heads of up to {_MAX_HEAD_DIM} numbers, and these have '
            f"{value.shape[3]}; use_backend('reference') takes them"
        )


def _key_aware_deform_attn(query, key, value, spatial_shapes, sampling_locations):
    _refuse_wide_heads(value)
    query, value, locations = _packed(query), _packed(value), _packed(sampling_locations)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    rows = {'query': query, 'output': output}
    operator = 'key aware, shared'
    if key is not None:
        rows['key'] = _packed(key)
        operator = 'key aware'
    _run(_kernels.mmlite_forward, _problem(operator, value, spatial_shapes, locations, **rows))
    return output.flatten(2)


def _ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    _refuse_wide_heads(value)
    value = _packed(value)
    locations, weights = _points(sampling_locations, attention_weights)
    output = value.new_empty(*locations.shape[:3], value.shape[3])
    rows = {'weights': weights, 'output': output}
    _run(_kernels.mmlite_forward, _problem('standard', value, spatial_shapes, locations, **rows))
    return output.flatten(2)


def _key_aware_deform_attn_backward(
    grad_output, query, key, value, spatial_shapes, sampling_locations, output_mask
):
    _refuse_wide_heads(value)
    query, value, locations = _packed(query), _packed(value), _packed(sampling_locations)
    rows = {'query': query, 'grad_output': _packed(grad_output.reshape(query.shape))}
    operator = 'key aware, shared'
    if key is not None:
        rows['key'] = key = _packed(key)
        operator = 'key aware'
    inputs = {'query': query, 'key': key, 'value': value, 'locations': locations}
    grads = _empty_grads(inputs, output_mask)
    if grads:
        problem = _problem(operator, value, spatial_shapes, locations, **rows, **grads)
        _run(_kernels.mmlite_backward, problem)
    return tuple(grads.get(f'grad_{name}', value.new_empty(0)) for name in inputs)


def _ms_deform_attn_backward(
    grad_output, value, spatial_shapes, sampling_locations, attention_weights, output_mask
):
    _refuse_wide_heads(value)
    value = _packed(value)
    locations, weights = _points(sampling_locations, attention_weights)
    shape = (*locations.shape[:3], value.shape[3])
    rows = {'weights': weights, 'grad_output': _packed(grad_output.reshape(shape))}
    inputs = {'value': value, 'locations': locations, 'weights': weights}
    grads = _empty_grads(inputs, output_mask)
    if grads:
        problem = _problem('standard', value, spatial_shapes, locations, **rows, **grads)
        _run(_kernels.mmlite_backward, problem)
    dtypes = (value.dtype, sampling_locations.dtype, attention_weights.dtype)
    return tuple(
        grads.get(f'grad_{name}', value.new_empty(0)).to(dtype)
        for name, dtype in zip(inputs, dtypes)
    )


def _empty_grads(
    inputs: Mapping[str, Tensor | None], output_mask: Sequence[bool]
) -> dict[str, Tensor]:
    """Room for the gradients that are wanted."""
    return {
        f'grad_{name}': tensor.new_empty(tensor.shape)
        for (name, tensor), wanted in zip(inputs.items(), output_mask)
        if wanted and tensor is not None
    }


if _kernels is not None:
    library.implement('key_aware_deform_attn', 'CPU', _key_aware_deform_attn)
    library.implement('key_aware_deform_attn_backward', 'CPU', _key_aware_deform_attn_backward)
    library.implement('ms_deform_attn', 'CPU', _ms_deform_attn)
    library.implement('ms_deform_attn_backward', 'CPU', _ms_deform_attn_backward)
