"""Stand-ins for the compiled modules that repositories import, on :mod:`mmlite.ops`.

They have the two functions of Deformable DETR's extension, for CPUs and GPUs, every float dtype and
any number of images, and are found only where the real module is not installed.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops

NAMES = ('MultiScaleDeformableAttention', 'groundingdino._C')


def install() -> None:
    """Let Python find a stand-in for a module of :data:`NAMES` where it finds no other."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)  # type: ignore[arg-type]  # the last to be asked


def ms_deform_attn_forward(value: Tensor, spatial_shapes: Tensor, *others: Any) -> Tensor:
    """Multi-scale deformable attention, as :func:`mmlite.ops.ms_deform_attn`.

    ``others`` are the first token of each level, which is not used and TrackFormer leaves out,
    sampling locations, attention weights, and ``im2col_step``, which is not used.
    """
    points = [t for t in others if isinstance(t, Tensor) and t.is_floating_point()]
    with torch.autocast(value.device.type, enabled=False):  # which a compiled operator ignores
        return ops.ms_deform_attn(value, spatial_shapes, *points)


def ms_deform_attn_backward(value: Tensor, spatial_shapes: Tensor, *others: Any) -> list[Tensor]:
    """The gradients of value, sampling locations and attention weights.

    ``others`` are as above, and the gradient of the output before ``im2col_step``.
    """
    given = [t for t in (value, *others) if isinstance(t, Tensor) and t.is_floating_point()]
    *inputs, grad_output = (tensor.detach().requires_grad_() for tensor in given)
    with torch.enable_grad():
        output = ms_deform_attn_forward(inputs[0], spatial_shapes, *inputs[1:])
    return list(torch.autograd.grad(output, inputs, grad_output))


class _Finder:
    """Finds the stand-ins, and fills their modules."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, cls) if name in NAMES else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name, __doc__)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        functions = ms_deform_attn_forward, ms_deform_attn_backward
        vars(module).update((function.__name__, function) for function in functions)
