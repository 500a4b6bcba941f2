"""The public operators: level sizes, autocast, and the choice of a backend.

Three backends compute the same functions:

========= ======================== =====================================================
backend   runs on                  what it is
========= ======================== =====================================================
cpu       CPU                      fused C++ kernels (:mod:`mmlite.ops.cpu`)
triton    CUDA                     fused Triton kernels (:mod:`mmlite.ops.triton`)
reference every device             plain PyTorch (:mod:`mmlite.ops.reference`), always there
========= ======================== =====================================================

The four functions are faces of one registered operator (:mod:`mmlite.ops.operator`), which the
fused backends implement. Both attentions come in two forms: with sampling locations, and
``*_from_offsets`` with what the locations are made of, which then are never written to memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, mmcv, operator, reference, triton

_FUSED = {'cpu': cpu, 'triton': triton}

_HAS_CUDA = torch.version.cuda is not None or torch.version.hip is not None


class _Choice(threading.local):
    """The backend that a thread has forced. (Dynamo does not trace context variables.)"""

    # No default of the class: dynamo of torch 2.8 reads that instead of the thread's value.
    def __init__(self) -> None:
        self.backend: str | None = None


_choice = _Choice()


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

    The choice holds for the calling thread alone.

    Args:
        name (str): ``'cpu'``, ``'triton'`` or ``'reference'``.

    Raises:
        ValueError: No backend has that name.
        RuntimeError: The backend cannot run here; the message says why.
    """
    status = {backend.name: backend for backend in backends()}
    if name not in status:
        raise ValueError(f'backend must be one of {", ".join(status)}; got {name!r}')
    if not status[name].available:
        raise RuntimeError(f'the {name} backend cannot run here: {status[name].detail}')
    previous, _choice.backend = _choice.backend, name
    try:
        yield
    finally:
        _choice.backend = previous


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
    return _attend(query, key, value, spatial_shapes, None, sampling_locations, None)


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
            ints, as in :func:`key_aware_deform_attn`.
        sampling_locations (Tensor): Normalised (x, y), shape (B, Q, M, L, P, 2), float32 or the
            dtype of ``value``. A location that is not finite counts as outside the map.
        attention_weights (Tensor): shape (B, Q, M, L, P), float32 or the dtype of ``value``.

    Returns:
        Tensor: shape (B, Q, M*D), dtype of ``value``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit each other.
    """
    return _attend(None, None, value, spatial_shapes, None, sampling_locations, attention_weights)


def key_aware_deform_attn_from_offsets(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> Tensor:
    """Key-aware deformable attention around reference points (Deformable DETR, appendix A.4).

    What :func:`key_aware_deform_attn` computes at :func:`mmlite.ops.reference.sampling_locations`,
    forward and backward, with the locations worked out inside the kernels. They are formed in
    float32 (float64 for float64) whatever the dtypes.

    ``query``, ``key``, ``value``, ``spatial_shapes``, the result and the errors are as there.

    Args:
        reference_points (Tensor): Normalised (x, y), or (cx, cy, w, h) of boxes, shape
            (B or 1, Q, L, 2 or 4), float32 or the dtype of ``query``.
        sampling_offsets (Tensor): Offsets (x, y) from the reference points, in pixels of each
            level, or from a box in halves of its size over P; shape (B, Q, M, L, P, 2), or
            (B, Q, M, 1, P, 2) for one set that serves every level. float32 or the dtype of
            ``query``.
    """
    return _attend(query, key, value, spatial_shapes, reference_points, sampling_offsets, None)


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention around reference points (Deformable DETR, appendix A.4).

    What :func:`ms_deform_attn` computes at :func:`mmlite.ops.reference.sampling_locations`.
    ``value``, ``attention_weights`` and the errors are as there; level sizes, reference points and
    offsets are as in :func:`key_aware_deform_attn_from_offsets`.

    Returns:
        Tensor: shape (B, Q, M*D), dtype of ``value``.
    """
    return _attend(
        None, None, value, spatial_shapes, reference_points, sampling_offsets, attention_weights
    )


def _attend(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    reference_points: Tensor | None,
    sampling: Tensor,
    attention_weights: Tensor | None,
) -> Tensor:
    """What the public functions share. The arguments are the registered operator's."""
    if key is value:
        key = None
    dtype = autocast_dtype(value.device.type)
    if dtype is not None:
        value = _cast(value, dtype)
        query = query if query is None else _cast(query, dtype)
        key = key if key is None else _cast(key, dtype)
    shapes = _read(spatial_shapes) if isinstance(spatial_shapes, Tensor) else spatial_shapes
    sizes: list[int] = []
    for shape in shapes:
        if len(shape) != 2:
            raise ValueError(f'spatial_shapes must be pairs (h, w); got {shape} among them')
        sizes += shape
    if torch.jit.is_tracing():  # where sizes may be tensors, which no operator takes
        sizes = [int(size) for size in sizes]
    points = (reference_points, sampling, attention_weights)
    if _is_fused(value, len(shapes)):
        return operator.deform_attn(query, key, value, sizes, *points)
    operator.check(query, key, value, sizes, *points)
    # mmcv's CUDA operator where Triton does not serve, unless the reference is asked for.
    if attention_weights is not None and _choice.backend is None and not mmcv.why_not(value):
        return mmcv.ms_deform_attn(value, shapes, reference_points, sampling, attention_weights)
    return reference.deform_attn(query, key, value, shapes, *points)


def _is_fused(value: Tensor, levels: int) -> bool:
    """Whether a fused backend takes the call: the one that is forced, or any."""
    name = _choice.backend
    if name == 'reference' or torch.onnx.is_in_onnx_export():  # ONNX has no such operator
        return False
    if name is None:
        # The registered operator knows its shapes, which is all that tensors without values
        # need: meta tensors, and CUDA tensors where torch has no CUDA, which are fake.
        if value.is_meta or (value.is_cuda and not _HAS_CUDA):
            return True
        return not all(module.why_not(value, levels) for module in _FUSED.values())
    reason = _FUSED[name].why_not(value, levels)
    if reason:
        raise ValueError(
            f'the {name} backend was asked for, but does not serve this call: {reason}'
        )
    return True


def _read(spatial_shapes: Tensor) -> list[tuple[int, int]]:
    """The one place where level sizes are read out of a tensor."""
    if spatial_shapes.is_floating_point():
        raise ValueError(f'spatial_shapes must hold integers; got {spatial_shapes.dtype}')
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
        raise ValueError(
            f'spatial_shapes must have shape (L, 2); got {tuple(spatial_shapes.shape)}'
        )
    if spatial_shapes.is_meta:
        raise ValueError('spatial_shapes is a meta tensor without values: pass pairs of ints')
    return [(height, width) for height, width in spatial_shapes.tolist()]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To autocast's dtype, as for a matrix product; float64 stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


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
