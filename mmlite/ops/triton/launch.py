"""What stands between the registered operator and the kernels: sizes, room for results, launch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LEVELS = 8  # of the sizes among the kernels' arguments
_INT32_ELEMENTS = 2**31


def forward(query, key, value, spatial_shapes, reference_points, sampling, attention_weights):
    """The operator; see :mod:`mmlite.ops.operator`."""
    from . import kernels

    tensors = (query, key, value, sampling, reference_points, attention_weights)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    problem = _Problem.of(value, spatial_shapes, sampling, reference_points)
    output = value.new_empty(problem.batch, problem.queries, problem.heads * problem.dim)
    if output.numel():
        config = configuration(*problem.padded)
        with _on_device_of(value):
            kernels.forward[problem.grid(config)](
                *tensors,
                output,
                KEY_AWARE=query is not None,
                KEY_IS_VALUE=key is None,
                **problem.arguments(config),
            )
    return output


def backward(
    grad_output,
    query,
    key,
    value,
    spatial_shapes,
    reference_points,
    sampling,
    attention_weights,
    output_mask,
):
    """The gradients of the operator's tensors in their order, empty where not wanted."""
    from . import kernels

    inputs = (query, key, value, reference_points, sampling, attention_weights)
    wanted = [tensor if is_wanted else None for tensor, is_wanted in zip(inputs, output_mask)]
    tensors = (query, key, value, sampling, reference_points, attention_weights)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    grad_output = grad_output.contiguous()
    problem = _Problem.of(value, spatial_shapes, sampling, reference_points)
    grad_query, grad_sampling, grad_weights = (_empty_like(wanted[i]) for i in (0, 4, 5))
    grad_reference = None
    if wanted[3] is not None:  # of each head, to be added up
        sizes = (problem.batch, problem.queries, problem.heads, problem.levels, problem.ref_dim)
        grad_reference = torch.empty(sizes, dtype=torch.float32, device=value.device)
    wants_features = wanted[1] is not None or wanted[2] is not None
    ordered = wants_features and torch.are_deterministic_algorithms_enabled()
    summands: Sequence[Tensor | None] = (None,) * 4
    if ordered:
        # The sum covers both: which of them is wanted hardly matters beside the sort.
        grad_key, grad_value = _empty_like(key), _empty_like(value)
        summands = _empty_summands(problem, value.device)
    else:  # atomics add up in float32 whatever the dtype
        grad_key, grad_value = (_float32_zeros_like(wanted[i]) for i in (1, 2))
    with _on_device_of(value):
        if sampling.numel():
            adds_single_numbers = _capability_of(value) < (9, 0)
            config = configuration(*problem.padded, adds_single_numbers and key is None)
            kernels.backward[problem.grid(config)](
                grad_output,
                *tensors,
                grad_query,
                grad_key,
                grad_value,
                grad_sampling,
                grad_reference,
                grad_weights,
                *summands,
                num_rows=problem.rows,
                KEY_AWARE=query is not None,
                KEY_IS_VALUE=key is None,
                ORDERED=ordered,
                GRAD_QUERY=grad_query is not None,
                GRAD_KEY=grad_key is not None,
                GRAD_VALUE=grad_value is not None,
                GRAD_SAMPLING=grad_sampling is not None,
                GRAD_REFERENCE=grad_reference is not None,
                GRAD_WEIGHTS=grad_weights is not None,
                **problem.arguments(config),
            )
        if ordered:
            _sum_in_order(problem, grad_output, tensors[0], summands, grad_key, grad_value)
    if grad_reference is not None:
        grad_reference = grad_reference.sum(2)
        if reference_points.shape[0] != problem.batch:
            grad_reference = grad_reference.sum(0, keepdim=True)
    grads = (grad_query, grad_key, grad_value, grad_reference, grad_sampling, grad_weights)
    return tuple(
        value.new_empty(0) if tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, wanted)
    )


class Config(NamedTuple):
    """How the queries are spread over programs.

    Attributes:
        block_q (int): Queries of a program.
        num_warps (int): Warps of a program.
    """

    block_q: int
    num_warps: int


def configuration(points: int, dim: int, wide: bool = False) -> Config:
    """What suits tiles of (points, block_q, dim): a thread holds 16 elements of one, or 32.

    ``wide``, 32 elements and one warp, suits the backward below compute capability 9.0. Atomics
    add one number an instruction there, and in the layout that suits them every thread with 16
    elements works the coordinates out again: 3,336 instructions a query against 1,510. With a key
    of its own the wide form spills registers.
    """
    elements, num_warps = (32, 1) if wide else (16, 4)
    return Config(max(1, elements * 32 * num_warps // (points * dim)), num_warps)


class _Problem(NamedTuple):
    """The sizes of a call, and what follows from them for a launch."""

    batch: int
    tokens: int
    queries: int
    heads: int
    levels: int
    points: int
    dim: int
    spatial_shapes: tuple[int, ...]
    ref_dim: int = 0  # numbers of a reference point; none where locations are given
    same_loc: bool = False  # one set of offsets for all levels
    reference_stride: int = 0  # from one image's reference points to the next one's

    @classmethod
    def of(
        cls,
        value: Tensor,
        spatial_shapes: Sequence[int],
        sampling: Tensor,
        reference_points: Tensor | None,
    ) -> _Problem:
        batch, tokens, heads, dim = value.shape
        queries, sets, points = (sampling.shape[i] for i in (1, 3, 4))
        shapes = tuple(spatial_shapes)
        levels = len(shapes) // 2
        problem = cls(batch, tokens, queries, heads, levels, points, dim, shapes)
        if reference_points is None:
            return problem
        stride = reference_points[0].numel() if reference_points.shape[0] > 1 else 0
        return problem._replace(
            ref_dim=reference_points.shape[-1],
            same_loc=sets == 1 and levels > 1,
            reference_stride=stride,
        )

    @property
    def rows(self) -> int:
        """Feature vectors: one for every image, head and token."""
        return self.batch * self.heads * self.tokens

    @property
    def padded(self) -> tuple[int, int]:
        """Points and channels of a tile: powers of two, as Triton's blocks must be."""
        return _power_of_two(self.points), _power_of_two(self.dim)

    def grid(self, config: Config) -> tuple[int]:
        blocks = -(-self.queries // config.block_q)
        return (self.batch * self.heads * blocks,)

    def arguments(self, config: Config) -> dict:
        """The arguments that both kernels share."""
        import triton.language as tl

        points, dim = self.padded
        sizes = self.spatial_shapes + (1,) * (2 * MAX_LEVELS - len(self.spatial_shapes))
        return dict(
            **{f'{"hw"[i % 2]}{i // 2}': size for i, size in enumerate(sizes)},
            scale=self.dim**-0.5,
            num_queries=self.queries,
            num_tokens=self.tokens,
            num_heads=self.heads,
            reference_stride=self.reference_stride,
            L=self.levels,
            P=self.points,
            D=self.dim,
            POINTS=points,
            DIM=dim,
            BLOCK_Q=config.block_q,
            INDEX=tl.int32 if self.tokens * self.heads * self.dim < _INT32_ELEMENTS else tl.int64,
            REF_DIM=self.ref_dim,
            SAME_LOC=self.same_loc,
            num_warps=config.num_warps,
            num_stages=1,  # which features are loaded depends on data: nothing to prefetch
            enable_fp_fusion=True,
        )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _empty_summands(problem: _Problem, device: torch.device) -> tuple[Tensor, ...]:
    """What the deterministic backward writes instead of adding.

    Two coefficients of every point, one for the output's gradient and one for the query, and the
    row and the bilinear weight of each of the point's four pixels.
    """
    points = problem.batch * problem.queries * problem.heads * problem.levels * problem.points
    rows_dtype = torch.int32 if problem.rows < 2**31 else torch.int64
    return (
        torch.empty(points, device=device),
        torch.empty(points, device=device),
        torch.empty(4 * points, device=device, dtype=rows_dtype),
        torch.empty(4 * points, device=device),
    )


def _sum_in_order(
    problem: _Problem,
    grad_output: Tensor,
    query: Tensor | None,
    summands: tuple[Tensor, ...],
    grad_key: Tensor | None,
    grad_value: Tensor,
) -> None:
    """Sort the summands by row and add up each row's in that order."""
    from . import kernels

    value_coefficients, query_coefficients, pixel_rows, pixel_weights = summands
    sorted_rows, order = torch.sort(pixel_rows, stable=True)
    rows = torch.arange(problem.rows + 1, device=pixel_rows.device, dtype=pixel_rows.dtype)
    row_starts = torch.searchsorted(sorted_rows, rows)
    block_rows = 16
    if problem.rows:
        kernels.ordered_sum[(-(-problem.rows // block_rows),)](
            grad_output,
            query,
            value_coefficients,
            query_coefficients,
            pixel_weights,
            order,
            row_starts,
            grad_key,
            grad_value,
            num_tokens=problem.tokens,
            num_heads=problem.heads,
            num_rows=problem.rows,
            KEY_AWARE=query is not None,
            KEY_IS_VALUE=grad_key is None,
            LP=problem.levels * problem.points,
            D=problem.dim,
            DIM=problem.padded[1],
            BLOCK_ROWS=block_rows,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _capability_of(tensor: Tensor) -> tuple[int, int]:
    # Triton's interpreter runs on the CPU.
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def _empty_like(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _float32_zeros_like(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.zeros_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)
