"""mmcv's CUDA operator of standard deformable attention, where Triton cannot serve.

PyTorch 2.1 to 2.3 bring a Triton that is too old for our kernels, and mmcv's wheels for them a
compiled operator. Nothing is imported here: mmcv is used where something else has imported it, as
MMDetection does. Its operator knows no bfloat16 and adds up in the dtype it gets, so half precision
is computed in float32 here, like in every backend.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def why_not(value: Tensor) -> str:
    """Why this backend refuses ``value``, or ''."""
    if not value.is_cuda:
        return f'it runs on CUDA, and value is on {value.device}'
    if torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled():
        return 'its backward pass is not deterministic'
    if value.dtype not in _DTYPES:
        return f'it has no kernels for {value.dtype}'
    return _problem()


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor | None,
    sampling: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Standard attention at locations, or at offsets from reference points; checked before."""
    if reference_points is not None:
        reference_points = reference.compute_dtype(reference_points)
        sampling = reference.sampling_locations(reference_points, sampling, spatial_shapes)
    if not sampling.numel():  # nothing to launch a kernel for
        return reference.ms_deform_attn(value, spatial_shapes, sampling, attention_weights)
    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
    output = _module().MultiScaleDeformableAttnFunction.apply(
        value.to(dtype).contiguous(),
        *_tables(tuple(map(tuple, spatial_shapes)), value.device),
        sampling.to(dtype).contiguous(),
        attention_weights.to(dtype).contiguous(),
        value.shape[0],  # images a launch, which must divide their number
    )
    return output.to(value.dtype)


def _module() -> Any:
    """mmcv's module, or None if it is not imported."""
    return sys.modules.get('mmcv.ops.multi_scale_deform_attn')


def _problem() -> str:
    """Why the operator can run on no device at all, or an empty string."""
    module = _module()
    if module is None:
        return 'mmcv.ops is not imported'
    # A build for the CPU has the functions too, and says so; a stand-in for mmcv-lite has none.
    version = getattr(module.ext_module, 'get_compiling_cuda_version', None)
    if version is None or version() == 'not available':
        return 'this mmcv is built without CUDA'
    return ''


@functools.lru_cache(maxsize=64)
def _tables(
    spatial_shapes: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Level sizes and the first token of each level, copied to the device once."""
    starts = [0]
    for height, width in spatial_shapes[:-1]:
        starts.append(starts[-1] + height * width)
    return torch.tensor(spatial_shapes, device=device), torch.tensor(starts, device=device)
