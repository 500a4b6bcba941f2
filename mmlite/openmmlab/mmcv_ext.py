"""The stand-in for mmcv's compiled module, ``mmcv._ext``, where there is none.

mmcv-lite is mmcv without its compiled operators, whose ``mmcv.ops`` cannot be imported. There this
file runs under the name ``mmcv._ext``; see :func:`mmlite.openmmlab.startup.at_startup`. It has what
MMDetection's DETRs call, with mmcv's names, signatures and numbers: deformable attention, ``nms``,
the sigmoid focal loss. Every other operator raises a sentence when it is called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def __getattr__(name: str) -> Callable:
    """An operator that is not here: mmcv asks for each by name, and most are never called."""
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"{name} is one of mmcv's compiled operators, and this mmcv has none; mmlite stands in "
            'for what DETRs need of them alone: install mmcv with its operators in place of '
            "mmcv-lite (pip uninstall mmcv-lite, then mim install 'mmcv>=2.0.0,<2.2')"
        )

    return missing


def get_compiler_version() -> str:
    """What mmcv's environment report shows."""
    return 'none: mmlite stands in for the compiled operators'


def get_compiling_cuda_version() -> str:
    """The answer of an mmcv that is compiled without CUDA."""
    return 'not available'


def ms_deform_attn_forward(value: Tensor, *others: Tensor, im2col_step: int) -> Tensor:
    """Deformable attention, which mmcv calls on GPUs alone; see :mod:`mmlite.models.standins`."""
    from mmlite.models import standins

    return standins.ms_deform_attn_forward(value, *others)


def ms_deform_attn_backward(value: Tensor, *others: Tensor, im2col_step: int) -> None:
    """The gradients of value, locations and weights, written into the last three tensors."""
    from mmlite.models import standins

    *given, grad_value, grad_locations, grad_weights = others
    found = standins.ms_deform_attn_backward(value, *given)
    for target, grad in zip((grad_value, grad_locations, grad_weights), found):
        target.copy_(grad)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4), x1, y1, x2, y2, that non-maximum suppression keeps, best first.

    A box that overlaps a better one by more than ``iou_threshold`` is dropped. ``offset`` is 1
    where the corners are pixels that belong to the box.
    """
    if offset:  # the same widths, intersections and areas
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    try:
        from torchvision.ops import nms as torchvision_nms

        return torchvision_nms(boxes, scores, iou_threshold)
    # Not there; or compiled for another PyTorch, or for CPUs alone, which it notices when it is
    # imported or when it is called.
    except (ImportError, RuntimeError):
        return _nms(boxes, scores, iou_threshold)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes[order].T.contiguous()
    areas = (x2 - x1) * (y2 - y1)
    overlaps = torch.minimum(x2[:, None], x2).sub_(torch.maximum(x1[:, None], x1)).clamp_(min=0)
    overlaps *= torch.minimum(y2[:, None], y2).sub_(torch.maximum(y1[:, None], y1)).clamp_(min=0)
    overlaps /= areas[:, None] + areas - overlaps
    drops = (overlaps > iou_threshold).triu(1).cpu().numpy()
    dropped = torch.zeros(len(order), dtype=torch.bool).numpy()
    for box, row in enumerate(drops):
        if not dropped[box]:
            dropped |= row
    return order[torch.from_numpy(~dropped).to(order.device)]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of each logit, (N, C), written into ``output``.

    ``target`` (N,) is the class, C the background; ``weight`` (C,) a factor for the rows of each
    class, or empty.
    """
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of :func:`sigmoid_focal_loss_forward`, written into ``grad_input``."""
    input = input.detach().requires_grad_()
    with torch.enable_grad():
        loss = _focal_loss(input, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, input)[0])


def _focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    is_class = target[:, None] == torch.arange(input.shape[1], device=input.device)
    factor = torch.where(is_class, alpha, 1 - alpha)
    if weight.numel():
        factor = factor * weight[target][:, None]
    tiny = torch.finfo(logits.dtype).tiny  # its derivative stays finite where it underflows
    mistake = torch.where(is_class, -logits, logits).sigmoid().clamp(min=tiny)
    entropy = F.binary_cross_entropy_with_logits(logits, is_class.to(logits), reduction='none')
    return factor * mistake**gamma * entropy
