"""What stands between the registered operator and the kernels: sizes, room for results, launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operator import tensors_of

MAX_LEVELS = 8  # of the sizes among the kernels' arguments
_INT32_ELEMENTS = 2**31
_ORDERED_ROWS = 16  # of a program that adds up in order


def forward(*arguments: Any) -> Tensor:
    """The operator; see :mod:`mmlite.ops.operator`."""
    from . import kernels

    _, _, value, _, _, sampling, _ = arguments
    batch, _, heads, dim = value.shape
    output = value.new_empty(batch, sampling.shape[1], heads * dim)
    if output.numel():
        grid, options = _prepare(*arguments[2:6])
        with _on_device_of(value):
            kernels.forward[grid](*_contiguous(tensors_of(arguments)), output, **options)
    return output


def backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of the operator's tensors in their order, empty where not wanted."""
    from . import kernels

    _, key, value, spatial_shapes, reference_points, sampling, _, output_mask = arguments
    inputs = tensors_of(arguments)
    wanted = [tensor if is_wanted else None for tensor, is_wanted in zip(inputs, output_mask)]
    grads = [_empty_like(tensor) for tensor in wanted]
    grad_output, *tensors = _contiguous((grad_output, *inputs))
    batch, tokens, heads, _ = value.shape
    queries, points = sampling.shape[1], sampling.shape[4]
    rows = batch * heads * tokens
    if grads[3] is not None:  # of each head, to be added up
        shape = (batch, queries, heads, *reference_points.shape[2:])
        grads[3] = value.new_empty(shape, dtype=torch.float32)
    wants_features = grads[1] is not None or grads[2] is not None
    ordered = wants_features and torch.are_deterministic_algorithms_enabled()
    summands: Sequence[Tensor | None] = (None,) * 4
    if ordered:
        # The sum covers both: which of them is wanted hardly matters beside the sort.
        grads[1:3] = _empty_like(key), _empty_like(value)
        # Of every point two coefficients, for the output's gradient and for the query, and of each
        # of its four pixels the row and the bilinear weight.
        count = batch * queries * heads * (len(spatial_shapes) // 2) * points
        row = torch.int32 if rows < 2**31 else torch.int64
        kinds = ((count, torch.float32),) * 2 + ((4 * count, row), (4 * count, torch.float32))
        summands = [value.new_empty(size, dtype=dtype) for size, dtype in kinds]
    else:  # atomics add up in float32 whatever the dtype
        for i in (1, 2):
            grads[i] = None if grads[i] is None else torch.zeros_like(grads[i], dtype=torch.float32)
    with _on_device_of(value):
        if sampling.numel():
            wide = key is None and _capability_of(value) < (9, 0)
            grid, options = _prepare(value, spatial_shapes, reference_points, sampling, wide)
            everything = (grad_output, *tensors, *grads, *summands)
            kernels.backward[grid](*everything, num_rows=rows, **options)
        if ordered and rows:
            value_coefficients, query_coefficients, pixel_rows, pixel_weights = summands
            sorted_rows, order = torch.sort(pixel_rows, stable=True)
            numbers = torch.arange(rows + 1, device=value.device, dtype=pixel_rows.dtype)
            kernels.ordered_sum[(-(-rows // _ORDERED_ROWS),)](
                grad_output,
                tensors[0],
                value_coefficients,
                query_coefficients,
                pixel_weights,
                order,
                torch.searchsorted(sorted_rows, numbers),
                *grads[1:3],
                num_tokens=tokens,
                num_heads=heads,
                num_rows=rows,
                LP=len(spatial_shapes) // 2 * points,
                D=value.shape[3],
                DIM=_power_of_two(value.shape[3]),
                BLOCK_ROWS=_ORDERED_ROWS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    if grads[3] is not None:
        grads[3] = grads[3].sum(2).sum_to_size(reference_points.shape)
    return tuple(
        value.new_empty(0) if tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, wanted)
    )


def configuration(points: int, dim: int, wide: bool = False) -> tuple[int, int]:
    """Queries and warps of a program that suit tiles of (points, queries, dim).

    A thread holds 16 elements of a tile, or 32. ``wide``, 32 elements and one warp, suits the
    backward below compute capability 9.0. Atomics add one number an instruction there, and in the
    layout that suits them every thread with 16 elements works the coordinates out again: 3,336
    instructions a query against 1,510. With a key of its own the wide form spills registers.
    """
    elements, num_warps = (32, 1) if wide else (16, 4)
    return max(1, elements * 32 * num_warps // (points * dim)), num_warps


def _prepare(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor | None,
    sampling: Tensor,
    wide: bool = False,
) -> tuple[tuple[int], dict]:
    """The grid, and the arguments that forward and backward share."""
    import triton.language as tl

    batch, tokens, heads, dim = value.shape
    _, queries, _, sets, points, _ = sampling.shape
    # Height and width of a level in one number, which has 64 bits whatever they are.
    pairs = zip(spatial_shapes[::2], spatial_shapes[1::2])
    sizes = [height << 32 | width for height, width in pairs]
    levels = len(sizes)
    sizes += sizes[:1] * (MAX_LEVELS - levels)
    ref_dim = reference_stride = 0
    if reference_points is not None:
        ref_dim = reference_points.shape[3]
        # From one image's reference points to the next one's.
        reference_stride = reference_points[0].numel() if reference_points.shape[0] > 1 else 0
    # Triton's blocks must be powers of two.
    padded = _power_of_two(points), _power_of_two(dim)
    block_q, num_warps = configuration(*padded, wide)
    return (batch * heads * -(-queries // block_q),), dict(
        **{f'size{level}': size for level, size in enumerate(sizes)},
        scale=dim**-0.5,
        num_queries=queries,
        num_tokens=tokens,
        num_heads=heads,
        reference_stride=reference_stride,
        L=levels,
        P=points,
        D=dim,
        POINTS=padded[0],
        DIM=padded[1],
        BLOCK_Q=block_q,
        INDEX=tl.int32 if tokens * heads * dim < _INT32_ELEMENTS else tl.int64,
        REF_DIM=ref_dim,
        SAME_LOC=sets < levels,
        num_warps=num_warps,
        num_stages=1,  # which features are loaded depends on data: nothing to prefetch
        enable_fp_fusion=True,
    )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _capability_of(tensor: Tensor) -> tuple[int, int]:
    # Triton's interpreter runs on the CPU.
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def _contiguous(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _empty_like(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
