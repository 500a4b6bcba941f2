"""Fused CPU kernels: the C++ of csrc/ behind a plain C interface, loaded with ctypes.

The library knows nothing of torch or Python, so one build serves every version of both. Where it
was not built (no compiler at installation), the backend reports itself unavailable and the
PyTorch formulation takes over. ``docs/kernels-cpu.md`` explains the kernels.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import library

_INTERFACE = 1  # kInterface of csrc/problem.h
_MAX_HEAD_DIM = 256
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ISAS = {'baseline': 0, 'avx2': 1, 'avx512': 2}
_SUFFIX = {'darwin': 'dylib', 'win32': 'dll'}.get(sys.platform, 'so')
_LIBRARY_PATH = Path(__file__).with_name(f'libmmlite_cpu.{_SUFFIX}')


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
        *((name, ctypes.c_int32) for name in ('dtype', 'point_dtype', 'isa', 'threads')),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or the reason why there is none."""
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
_isa = _kernels.mmlite_best_isa() if _kernels else _ISAS['baseline']


def status() -> tuple[bool, str]:
    """Whether the kernels run here, and what runs or why not."""
    if _kernels is None:
        return False, _why_not
    name = next(name for name, code in _ISAS.items() if code == _isa)
    return True, f'{name} kernels on {torch.get_num_threads()} threads'


def why_not(value: Tensor, levels: int) -> str:
    """Why this backend does not take a call with such a ``value`` and so many levels, or ''."""
    if _kernels is None:
        return _why_not
    if value.device.type != 'cpu':
        return f'it runs on the CPU, and value is on {value.device}'
    if value.dtype not in _DTYPES:
        return f'it has no kernels for {value.dtype}'
    if value.shape[-1] > _MAX_HEAD_DIM:
        return f'it serves heads of up to {_MAX_HEAD_DIM} numbers, and these have {value.shape[-1]}'
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
    global _isa
    if name not in isas():
        raise ValueError(f'isa must be one of {", ".join(isas())} here; got {name!r}')
    previous, _isa = _isa, _ISAS[name]
    try:
        yield
    finally:
        _isa = previous


def _rows(tensor: Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), *tensor.stride()[:3])


def _packed(tensor: Tensor) -> Tensor:
    """A copy where the kernels could not step through all but the first three dimensions."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[3:]), reversed(tensor.stride()[3:])):
        if stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _points(locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, the wider of the two."""
    dtype = torch.promote_types(locations.dtype, weights.dtype)
    return _packed(locations.to(dtype)), _packed(weights.to(dtype))


def _problem(
    value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, **rows: Tensor
) -> _Problem:
    """Describe a call. The problem does not keep the tensors alive: the caller does."""
    batch, tokens, heads, dim = value.shape
    problem = _Problem(
        batch=batch,
        tokens=tokens,
        queries=locations.shape[1],
        heads=heads,
        dim=dim,
        levels=locations.shape[3],
        points=locations.shape[4],
        spatial_shapes=(ctypes.c_int64 * len(spatial_shapes))(*spatial_shapes),
        value=_rows(value),
        locations=_rows(locations),
        dtype=_DTYPES[value.dtype],
        point_dtype=_DTYPES[locations.dtype],
        isa=_isa,
        threads=torch.get_num_threads(),
    )
    for name, tensor in rows.items():
        setattr(problem, name, _rows(tensor))
    return problem


def _run(function: ctypes._CFuncPtr, problem: _Problem, spatial_shapes: Sequence[int]) -> None:
    status = function(problem)
    if status == 1:
        raise ValueError(
            f'spatial_shapes {list(spatial_shapes)} does not stand for the '
            f'{problem.tokens} tokens of value'
        )
    if status == 2:
        raise ValueError(
            f'value has too many tokens for the CPU kernels: {problem.tokens} of {problem.dim} '
            "numbers a head; use_backend('reference') takes them"
        )
    if status:
        raise MemoryError('no memory for the scratch space of deformable attention')


def _key_aware_deform_attn(query, key, value, spatial_shapes, sampling_locations):
    query, value, locations = _packed(query), _packed(value), _packed(sampling_locations)
    batch, queries, heads, dim = query.shape
    output = query.new_empty(batch, queries, heads, dim)
    rows = {'query': query, 'output': output}
    if key is not None:
        rows['key'] = _packed(key)
    problem = _problem(value, spatial_shapes, locations, **rows)
    _run(_kernels.mmlite_forward, problem, spatial_shapes)
    return output.view(batch, queries, heads * dim)


def _ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    value = _packed(value)
    locations, weights = _points(sampling_locations, attention_weights)
    batch, queries, heads = locations.shape[:3]
    output = value.new_empty(batch, queries, heads, value.shape[3])
    problem = _problem(value, spatial_shapes, locations, weights=weights, output=output)
    _run(_kernels.mmlite_forward, problem, spatial_shapes)
    return output.view(batch, queries, heads * value.shape[3])


def _key_aware_deform_attn_backward(
    grad_output, query, key, value, spatial_shapes, sampling_locations
):
    wide = _backward_dtype(value)
    locations = _packed(sampling_locations)
    rows = {
        'query': _packed(query.to(wide)),
        'grad_output': _packed(grad_output.to(wide).reshape(query.shape)),
        'grad_query': query.new_empty(query.shape, dtype=wide),
        'grad_value': value.new_empty(value.shape, dtype=wide),
        'grad_locations': locations.new_empty(locations.shape, dtype=wide),
    }
    if key is not None:
        rows['key'] = _packed(key.to(wide))
        rows['grad_key'] = key.new_empty(key.shape, dtype=wide)
    value = _packed(value.to(wide))
    problem = _problem(value, spatial_shapes, locations, **rows)
    _run(_kernels.mmlite_backward, problem, spatial_shapes)
    return (
        rows['grad_query'].to(query.dtype),
        query.new_empty(0) if key is None else rows['grad_key'].to(query.dtype),
        rows['grad_value'].to(query.dtype),
        rows['grad_locations'].to(sampling_locations.dtype),
    )


def _ms_deform_attn_backward(
    grad_output, value, spatial_shapes, sampling_locations, attention_weights
):
    dtype, wide = value.dtype, _backward_dtype(value)
    locations, weights = _points(sampling_locations, attention_weights)
    batch, queries, heads = locations.shape[:3]
    grad_output = grad_output.to(wide).reshape(batch, queries, heads, value.shape[3])
    rows = {
        'weights': weights,
        'grad_output': _packed(grad_output),
        'grad_value': value.new_empty(value.shape, dtype=wide),
        'grad_locations': locations.new_empty(locations.shape, dtype=wide),
        'grad_weights': locations.new_empty(attention_weights.shape, dtype=wide),
    }
    value = _packed(value.to(wide))
    problem = _problem(value, spatial_shapes, locations, **rows)
    _run(_kernels.mmlite_backward, problem, spatial_shapes)
    return (
        rows['grad_value'].to(dtype),
        rows['grad_locations'].to(sampling_locations.dtype),
        rows['grad_weights'].to(attention_weights.dtype),
    )


def _backward_dtype(tensor: Tensor) -> torch.dtype:
    """Gradients of half-precision tensors are summed in float32 and rounded once."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


if _kernels is not None:
    library.implement('key_aware_deform_attn', 'CPU', _key_aware_deform_attn)
    library.implement('key_aware_deform_attn_backward', 'CPU', _key_aware_deform_attn_backward)
    library.implement('ms_deform_attn', 'CPU', _ms_deform_attn)
    library.implement('ms_deform_attn_backward', 'CPU', _ms_deform_attn_backward)
