"""``mmlite benchmark ops`` with the standard operators of other packages beside ours.

    python benchmarks/peers.py --device cuda --dtype float16

Measured are deformops and Hugging Face's kernel, each where it is installed and runs. Options are
those of ``mmlite benchmark ops``.
"""

from __future__ import annotations

import sys

import torch
from torch.autograd.function import once_differentiable

from mmlite.analysis.operators import OTHERS, Operator, arguments
from mmlite.cli import main

HUB_KERNEL = 'kernels-community/deformable-detr'


def deformops(device: str) -> Operator:
    """deformops' by its own choice: Triton or CUDA on a GPU, grid_sample on the CPU."""
    from deformops.registry import msda

    return lambda x: msda(*arguments(x))


def hugging_face(device: str) -> Operator:
    """The CUDA kernel that transformers takes from Hugging Face's hub, if it is in the cache."""
    if torch.device(device).type != 'cuda':
        raise RuntimeError('it runs on CUDA')
    from kernels import get_local_kernel, install_kernel

    kernel = get_local_kernel(install_kernel(HUB_KERNEL, revision='main', local_files_only=True))

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return kernel.ms_deform_attn_forward(*args, len(args[0]))

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            args = (*ctx.saved_tensors, grad.contiguous(), len(grad))
            value, locations, weights = kernel.ms_deform_attn_backward(*args)
            return value, None, None, locations, weights

    return lambda x: Attention.apply(*arguments(x))


PEERS = {'deformops': deformops, 'Hugging Face': hugging_face}

if __name__ == '__main__':
    OTHERS.update(PEERS)
    main(['benchmark', 'ops', *sys.argv[1:]])
