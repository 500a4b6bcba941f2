"""Fused GPU kernels in Triton: whether they can run here.

:mod:`.launch` prepares and launches a call, :mod:`.kernels` holds the device code.
docs/kernels-gpu.md explains the design.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .. import operator
from . import launch

_MINIMUM_TRITON = (3, 0)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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


# Settled here, since a graph that torch.compile traces through `why_not` cannot hold an import.
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
    """Why this backend refuses ``value`` with so many levels, or ''."""
    if _PROBLEM:
        return _PROBLEM
    if not value.is_cuda:
        return f'it runs on CUDA, and value is on {value.device}'
    if value.dtype not in _DTYPES:
        return f'it has no kernels for {value.dtype}'
    if levels > launch.MAX_LEVELS:
        return f'it serves up to {launch.MAX_LEVELS} levels, and there are {levels}'
    return _device_problem(value.device.index)


operator.implement('CUDA', launch.forward, launch.backward)
