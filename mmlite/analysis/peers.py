"""Other people's operators of standard deformable attention, called as ours are.

Every function of :data:`PEERS` returns one for a device. It raises whatever the other package
raises where that is not installed or cannot run there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .inputs import OperatorInputs

Operator = Callable[[OperatorInputs], Tensor]

_IMAGES_A_LAUNCH = (
    64  # mmcv's default; a batch is a divisor or a multiple of it, or it is the batch
)
_HUB_KERNEL = 'kernels-community/deformable-detr'


def mmcv(device: str) -> Operator:
    """mmcv's: compiled on CUDA, grid_sample on the CPU."""
    from mmcv.ops import multi_scale_deform_attn as mmcv

    def on_cuda(x: OperatorInputs) -> Tensor:
        return mmcv.MultiScaleDeformableAttnFunction.apply(*_arguments(x), len(x.value))

    def on_cpu(x: OperatorInputs) -> Tensor:
        value, shapes, _, locations, weights = _arguments(x)
        return mmcv.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    return on_cuda if _is_cuda(device) else on_cpu


def deformops(device: str) -> Operator:
    """deformops' by its own choice: Triton or CUDA on a GPU, grid_sample on the CPU."""
    from deformops.registry import msda

    return lambda x: msda(*_arguments(x))


def hugging_face(device: str) -> Operator:
    """The CUDA kernel that transformers takes from Hugging Face's hub, if it is in the cache."""
    if not _is_cuda(device):
        raise RuntimeError('it runs on CUDA')
    from kernels import get_local_kernel, install_kernel

    kernel = get_local_kernel(install_kernel(_HUB_KERNEL, revision='main', local_files_only=True))

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return kernel.ms_deform_attn_forward(*args, len(args[0]))

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_output):
            args = ctx.saved_tensors
            value, locations, weights = kernel.ms_deform_attn_backward(
                *args, grad_output.contiguous(), len(args[0])
            )
            return value, None, None, locations, weights

    return lambda x: Attention.apply(*_arguments(x))


PEERS = {'mmcv': mmcv, 'deformops': deformops, 'Hugging Face': hugging_face}


def _arguments(x: OperatorInputs) -> tuple[Tensor, ...]:
    """Value, level sizes, first token of each level, locations and weights, all of one dtype."""
    tokens = x.spatial_shapes.prod(-1)
    starts = tokens.cumsum(0) - tokens
    locations = x.sampling_locations.to(x.value.dtype)
    return x.value, x.spatial_shapes, starts, locations, x.attention_weights


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == 'cuda'
