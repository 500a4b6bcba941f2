"""The public operators: argument checks, autocast, and the choice of a backend.

Three backends compute the same functions:

========= ======================== =====================================================
backend   runs on                  what it is
========= ======================== =====================================================
cpu       CPU                      fused C++ kernels (:mod:`mmlite.ops.cpu`)
triton    CUDA                     fused Triton kernels (:mod:`mmlite.ops.triton`)
reference every device             plain PyTorch (:mod:`mmlite.ops.reference`), always there
========= ======================== =====================================================

The fused ones are ``torch.library`` operators (:mod:`mmlite.ops.library`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, library, reference, triton

_FUSED = {'cpu': cpu, 'triton': triton}
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_forced_backend: str | None = None


class BackendStatus(NamedTuple):
    """Whether a backend can run here.

    Attributes:
        name (str): ``cpu``, ``triton`` or ``reference``.
        available (bool): Whether it can run.
        detail (str): What will run (instruction set, version), or why it cannot.
    """

    name: str
    available: bool
    detail: str


def backends() -> list[BackendStatus]:
    """List every backend with whether it runs here and why not.

    Returns:
        list[BackendStatus]: The fused backends, then the reference.
    """
    fused = [BackendStatus(name, *module.status()) for name, module in _FUSED.items()]
    return [*fused, BackendStatus('reference', True, f'PyTorch {torch.__version__}')]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every operator call inside the ``with`` block.

    The choice holds for the whole process, other threads included.

    Args:
        name (str): ``'cpu'``, ``'triton'`` or ``'reference'``.

    Raises:
        ValueError: No backend has that name.
        RuntimeError: The backend cannot run here; the message says why.
    """
    global _forced_backend
    status = {backend.name: backend for backend in backends()}
    if name not in status:
        raise ValueError(f'backend must be one of {", ".join(status)}; got {name!r}')
    if not status[name].available:
        raise RuntimeError(f'the {name} backend cannot run here: {status[name].detail}')
    previous, _forced_backend = _forced_backend, name
    try:
        yield
    finally:
        _forced_backend = previous


def key_aware_deform_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
) -> Tensor:
    r"""Key-aware deformable attention (Lite DETR, section 4.3).

    Keys and values are sampled bilinearly at the same points, zero outside the map, and every
    head of a query attends to its ``L*P`` sampled pairs with weights
    :math:`\mathrm{softmax}(q k^T / \sqrt{D})`. Points outside the map stay in the softmax with a
    logit of zero.

    Args:
        query (Tensor): Projected queries, shape (B, Q, M, D).
        key (Tensor): Projected keys, shape (B, S, M, D), or the very tensor given as ``value``:
            then every point is sampled once and serves as both.
        value (Tensor): Projected values, shape (B, S, M, D), dtype of ``query``.
        spatial_shapes (Sequence[tuple[int, int]] | Tensor): (h, w) of every level, L pairs of
            ints; S is the sum of their products. A tensor of shape (L, 2) is read out, which on
            a GPU waits for the device and ends a compiled graph.
        sampling_locations (Tensor): Normalised (x, y), shape (B, Q, M, L, P, 2), float32 or the
            dtype of ``query``. A location that is not finite counts as outside the map.

    Returns:
        Tensor: shape (B, Q, M*D), dtype of ``query``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other.
    """
    key_is_value = key is value
    query, key, value = _autocast(query, key, value)
    _check_value(value, sampling_locations)
    batch, queries, heads = sampling_locations.shape[:3]
    _check_shape('query', query, (batch, queries, heads, value.shape[-1]))
    _check_same('query', query, 'value', value)
    if not key_is_value:
        _check_shape('key', key, tuple(value.shape))
        _check_same('key', key, 'value', value)
    spatial_shapes = _check_spatial_shapes(spatial_shapes, value, sampling_locations)
    op = _choose(
        value, len(spatial_shapes), library.key_aware_deform_attn, reference.key_aware_deform_attn
    )
    return op(query, None if key_is_value else key, value, spatial_shapes, sampling_locations)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, eq. 3), the numbers of mmcv's op.

    Args:
        value (Tensor): Projected values, shape (B, S, M, D).
        spatial_shapes (Sequence[tuple[int, int]] | Tensor): (h, w) of every level, L pairs of
            ints; S is the sum of their products. A tensor of shape (L, 2) is read out, which on
            a GPU waits for the device and ends a compiled graph.
        sampling_locations (Tensor): Normalised (x, y), shape (B, Q, M, L, P, 2), float32 or the
            dtype of ``value``. A location that is not finite counts as outside the map.
        attention_weights (Tensor): shape (B, Q, M, L, P), float32 or the dtype of ``value``.

    Returns:
        Tensor: shape (B, Q, M*D), dtype of ``value``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other.
    """
    (value,) = _autocast(value)
    _check_value(value, sampling_locations)
    _check_shape('attention_weights', attention_weights, tuple(sampling_locations.shape[:-1]))
    _check_float32_or_same('attention_weights', attention_weights, value)
    spatial_shapes = _check_spatial_shapes(spatial_shapes, value, sampling_locations)
    op = _choose(value, len(spatial_shapes), library.ms_deform_attn, reference.ms_deform_attn)
    return op(value, spatial_shapes, sampling_locations, attention_weights)


def _choose(value: Tensor, levels: int, fused_op, reference_op):
    """The forced backend, or the fused one of the device where it is there."""
    name = _forced_backend
    if name is None:
        fits = (name for name, module in _FUSED.items() if not module.why_not(value, levels))
        name = next(fits, 'reference')
    if name == 'reference':
        return reference_op
    reason = _FUSED[name].why_not(value, levels)
    if reason:
        raise ValueError(
            f'the {name} backend was asked for, but does not serve this call: {reason}'
        )
    return fused_op


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype, as a matrix product would be; float64 stays as it is."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on such a device, or None where it is off."""
    if device_type == 'meta':
        return None
    if hasattr(torch, 'get_autocast_dtype'):  # torch 2.4
        enabled = torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if enabled else None
    if device_type == 'cuda':
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


def _check_value(value: Tensor, sampling_locations: Tensor) -> None:
    if value.dim() != 4:
        raise ValueError(f'value must be (B, S, M, D); got shape {tuple(value.shape)}')
    if value.dtype not in _FLOAT_DTYPES:
        raise ValueError(f'value must be a floating-point tensor; got {value.dtype}')
    if sampling_locations.dim() != 6 or sampling_locations.shape[-1] != 2:
        raise ValueError(
            'sampling_locations must be (B, Q, M, L, P, 2); '
            f'got shape {tuple(sampling_locations.shape)}'
        )
    if 0 in sampling_locations.shape[3:5]:
        raise ValueError(
            'sampling_locations must have a level and a point at least; '
            f'got shape {tuple(sampling_locations.shape)}'
        )
    batch, _, heads, _ = value.shape
    if sampling_locations.shape[0] != batch or sampling_locations.shape[2] != heads:
        raise ValueError(
            f'sampling_locations has batch {sampling_locations.shape[0]} and '
            f'{sampling_locations.shape[2]} heads, but value has batch {batch} and {heads} heads'
        )
    _check_float32_or_same('sampling_locations', sampling_locations, value)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f'{name} must have shape {shape}; got {tuple(tensor.shape)}')


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f'{name} is {tensor.dtype} on {tensor.device}, '
            f'but {other_name} is {other.dtype} on {other.device}'
        )


def _check_float32_or_same(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.device != value.device:
        raise ValueError(f'{name} is on {tensor.device}, but value is on {value.device}')
    allowed = {value.dtype} if value.dtype == torch.float64 else {torch.float32, value.dtype}
    if tensor.dtype not in allowed:
        raise ValueError(
            f'{name} must be {" or ".join(sorted(map(str, allowed)))}; got {tensor.dtype}'
        )


def _check_spatial_shapes(
    spatial_shapes: Sequence[tuple[int, int]] | Tensor, value: Tensor, sampling_locations: Tensor
) -> list[tuple[int, int]]:
    """Check the level sizes and return them as pairs of ints."""
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = _read(spatial_shapes)
    shapes = [tuple(shape) for shape in spatial_shapes]
    levels = sampling_locations.shape[3]
    if len(shapes) != levels or any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f'spatial_shapes must be {levels} pairs (h, w), as sampling_locations has {levels} '
            f'levels; got {shapes}'
        )
    tokens = sum(height * width for height, width in shapes)
    if tokens != value.shape[1] or any(size < 1 for shape in shapes for size in shape):
        raise ValueError(
            f'spatial_shapes {shapes} stands for {tokens} tokens, but value has {value.shape[1]}'
        )
    return shapes


def _read(spatial_shapes: Tensor) -> list:
    """The one place where level sizes are read out of a tensor."""
    if spatial_shapes.is_floating_point():
        raise ValueError(f'spatial_shapes must hold integers; got {spatial_shapes.dtype}')
    if spatial_shapes.dim() != 2:
        raise ValueError(
            f'spatial_shapes must have shape (L, 2); got {tuple(spatial_shapes.shape)}'
        )
    if spatial_shapes.is_meta:
        raise ValueError('spatial_shapes is a meta tensor without values: pass pairs of ints')
    return spatial_shapes.tolist()
