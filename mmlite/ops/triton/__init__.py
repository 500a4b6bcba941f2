"""Fused GPU kernels in Triton.

Here the kernels are launched and registered; :mod:`.kernels` holds the device code and
:mod:`.tuning` chooses the launch configuration. docs/kernels-gpu.md explains the design.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import library
from .tuning import TUNER, Config, Result, by_rule, candidates, maker, work_class

_MINIMUM_TRITON = (3, 0)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INT32_ELEMENTS = 2**31
_MAX_LEVELS = 8  # of the sizes among the kernels' arguments
_MINIMUM_CAPABILITY = (7, 0)  # what Triton 3 compiles for


def _problem() -> str:
    """Why the kernels can run on no device at all, or an empty string."""
    if torch.version.cuda is None and torch.version.hip is None:
        return 'this PyTorch is built without CUDA'
    try:
        import triton
    except ImportError:
        return 'Triton is not installed'
    if tuple(int(part) for part in triton.__version__.split('.')[:2]) < _MINIMUM_TRITON:
        return (
            f'Triton {triton.__version__} is too old: at least 3.0 is needed, '
            'which comes with PyTorch 2.4'
        )
    return ''


# Settled here, since a graph that torch.compile traces through `serves` cannot hold an import.
_PROBLEM = _problem()


def status() -> tuple[bool, str]:
    """Whether the kernels run here, and what runs or why not."""
    if _PROBLEM:
        return False, _PROBLEM
    if not torch.cuda.is_available():
        return False, 'PyTorch sees no CUDA device'
    problem = _device_problem(None)
    if problem:
        return False, problem
    import triton

    return True, f'Triton {triton.__version__} on {torch.cuda.get_device_name()}'


@torch.compiler.assume_constant_result  # so that graphs do not trace into it
def _device_problem(index: int | None) -> str:
    """Why the kernels cannot run on one device (None: the current one), or an empty string."""
    return _examine(torch.cuda.current_device() if index is None else index)


@functools.cache
def _examine(index: int) -> str:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        if os.environ.get('MMLITE_AMD', '0') not in ('', '0'):
            return ''
        return f'the kernels were never tried on AMD GPUs ({name}); MMLITE_AMD=1 tries them'
    capability = torch.cuda.get_device_capability(index)
    if capability < _MINIMUM_CAPABILITY:
        return (
            f'{name} has compute capability {capability[0]}.{capability[1]}, '
            'and Triton compiles for 7.0 and newer'
        )
    return ''


def why_not(value: Tensor, levels: int) -> str:
    """Why this backend does not take a call with such a ``value`` and so many levels, or ''."""
    if _PROBLEM:
        return _PROBLEM
    if not value.is_cuda:
        return f'it runs on CUDA, and value is on {value.device}'
    if value.dtype not in _DTYPES:
        return f'it has no kernels for {value.dtype}'
    if levels > _MAX_LEVELS:
        return f'it serves up to {_MAX_LEVELS} levels, and there are {levels}'
    return _device_problem(value.device.index)


def key_aware_deform_attn(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
) -> Tensor:
    """Key-aware deformable attention, forward; see :func:`mmlite.ops.key_aware_deform_attn`."""
    return _forward(query, key, value, spatial_shapes, sampling_locations, None)


def key_aware_deform_attn_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and sampling_locations, empty where not wanted.

    The key's is empty where ``key`` is ``None``.
    """
    return _backward(
        grad_output,
        query,
        key,
        value,
        spatial_shapes,
        sampling_locations,
        None,
        (*output_mask, False, False),
    )[:4]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention, forward; see :func:`mmlite.ops.ms_deform_attn`."""
    return _forward(None, None, value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, sampling_locations and attention_weights, empty where not wanted."""
    return _backward(
        grad_output,
        None,
        None,
        value,
        spatial_shapes,
        sampling_locations,
        attention_weights,
        (False, False, *output_mask, False),
    )[2:5]


def key_aware_deform_attn_from_offsets(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
) -> Tensor:
    """Forward; see :func:`mmlite.ops.key_aware_deform_attn_from_offsets`."""
    return _forward(query, key, value, spatial_shapes, sampling_offsets, None, reference_points)


def key_aware_deform_attn_from_offsets_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the tensors in their order, empty where not wanted."""
    *features, wants_reference, wants_offsets = output_mask
    *grads, offsets, _, reference = _backward(
        grad_output,
        query,
        key,
        value,
        spatial_shapes,
        sampling_offsets,
        None,
        (*features, wants_offsets, False, wants_reference),
        reference_points,
    )
    return *grads, reference, offsets


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Forward; see :func:`mmlite.ops.ms_deform_attn_from_offsets`."""
    return _forward(
        None, None, value, spatial_shapes, sampling_offsets, attention_weights, reference_points
    )


def ms_deform_attn_from_offsets_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_weights: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the tensors in their order, empty where not wanted."""
    wants_value, wants_reference, wants_offsets, wants_weights = output_mask
    _, _, value_grad, offsets, weights, reference = _backward(
        grad_output,
        None,
        None,
        value,
        spatial_shapes,
        sampling_offsets,
        attention_weights,
        (False, False, wants_value, wants_offsets, wants_weights, wants_reference),
        reference_points,
    )
    return value_grad, reference, offsets, weights


for _operator in (
    key_aware_deform_attn,
    key_aware_deform_attn_backward,
    key_aware_deform_attn_from_offsets,
    key_aware_deform_attn_from_offsets_backward,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_from_offsets,
    ms_deform_attn_from_offsets_backward,
):
    library.implement(_operator.__name__, 'CUDA', _operator)


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
        sizes = self.spatial_shapes + (1,) * (2 * _MAX_LEVELS - len(self.spatial_shapes))
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

    def tuning_key(self) -> tuple[int, ...]:
        """Sizes that a configuration may depend on; the amount of work only roughly."""
        sizes = (self.levels, self.points, self.dim, work_class(self.pairs))
        return sizes if not self.ref_dim else (*sizes, self.ref_dim, int(self.same_loc))

    @property
    def pairs(self) -> int:
        """Pairs of a query and a head."""
        return self.batch * self.queries * self.heads


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _forward(
    query, key, value, spatial_shapes, sampling, attention_weights, reference_points=None
) -> Tensor:
    """Both forwards: key-aware where there is a query, else with the weights given."""
    from . import kernels

    tensors = (query, key, value, sampling, reference_points, attention_weights)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    problem = _Problem.of(value, spatial_shapes, sampling, reference_points)

    def run(config: Config) -> Tensor:
        output = value.new_empty(problem.batch, problem.queries, problem.heads * problem.dim)
        if output.numel():
            kernels.forward[problem.grid(config)](
                *tensors,
                output,
                KEY_AWARE=query is not None,
                KEY_IS_VALUE=key is None,
                AHEAD=config.ahead,
                **problem.arguments(config),
            )
        return output

    return _run_tuned('forward', run, problem, tensors)


def _backward(
    grad_output,
    query,
    key,
    value,
    spatial_shapes,
    sampling,
    attention_weights,
    output_mask,
    reference_points=None,
) -> tuple[Tensor, ...]:
    """Both backwards: of query, key, value, sampling, attention_weights and reference_points.

    Empty where there is no such input, or where its gradient is not wanted.
    """
    from . import kernels

    inputs = (query, key, value, sampling, attention_weights, reference_points)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in inputs]
    # As the kernel takes them: the reference points before the weights.
    tensors = [*tensors[:4], tensors[5], tensors[4]]
    grad_output = grad_output.contiguous()
    problem = _Problem.of(value, spatial_shapes, sampling, reference_points)
    ordered = torch.are_deterministic_algorithms_enabled()
    wanted = [tensor if is_wanted else None for tensor, is_wanted in zip(inputs, output_mask)]
    wants_features = wanted[1] is not None or wanted[2] is not None

    def run(config: Config):
        grad_query, grad_sampling, grad_weights = (_empty_like(wanted[i]) for i in (0, 3, 4))
        grad_reference = None
        if wanted[5] is not None:  # of each head, to be added up
            sizes = (problem.batch, problem.queries, problem.heads, problem.levels, problem.ref_dim)
            grad_reference = torch.empty(sizes, dtype=torch.float32, device=value.device)
        summands = (None,) * 4
        if ordered and wants_features:
            # The sum covers both: which of them is wanted hardly matters beside the sort.
            grad_key, grad_value = _empty_like(key), _empty_like(value)
            summands = _empty_summands(problem, value.device)
        else:  # atomics add up in float32 whatever the dtype
            grad_key, grad_value = (_float32_zeros_like(wanted[i]) for i in (1, 2))
        if sampling.numel():
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
        if ordered and wants_features:
            _sum_in_order(problem, grad_output, tensors[0], summands, grad_key, grad_value)
        if grad_reference is not None:
            grad_reference = grad_reference.sum(2)
            if reference_points.shape[0] != problem.batch:
                grad_reference = grad_reference.sum(0, keepdim=True)
        grads = (grad_query, grad_key, grad_value, grad_sampling, grad_weights, grad_reference)
        return tuple(
            value.new_empty(0) if tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, wanted)
        )

    return _run_tuned('backward', run, problem, [*tensors, *wanted])


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
    """Sort the summands by the row they belong to and add up each row's in that order."""
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


def _run_tuned(
    name: str, run: Callable[[Config], Result], problem: _Problem, tensors: list[Tensor | None]
) -> Result:
    """``run`` on the device of the tensors, with the configuration that suits it."""
    some = next(tensor for tensor in tensors if tensor is not None)
    dtypes = (None if tensor is None else tensor.dtype for tensor in tensors)
    key = ' '.join(map(str, (name, *dtypes, *problem.tuning_key())))
    configs = candidates(*problem.padded)
    if not some.is_cuda:  # Triton's interpreter
        return TUNER.run(run, key, configs, None)
    with torch.cuda.device_of(some):
        capability = torch.cuda.get_device_capability()
        configs = by_rule(configs, name, capability, problem.pairs)
        return TUNER.run(run, key, configs, maker(some.get_device()))


def _empty_like(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _float32_zeros_like(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.zeros_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)
