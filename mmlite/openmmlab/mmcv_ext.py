"""The stand-in for mmcv's compiled module, ``mmcv._ext``, where there is none.

mmcv-lite is mmcv without its compiled operators: a pure wheel that installs in seconds, whose
``mmcv.ops`` cannot be imported. This module answers there for ``mmcv._ext``. It has what
MMDetection's DETRs call of it, with the numbers of the compiled operators: deformable attention on
our operators, ``nms`` and ``softnms``, the sigmoid focal loss. Every other operator raises a
sentence when it is called.

The installed package has a finder in place whenever Python starts, last in line
(:func:`mmlite.openmmlab.startup.at_startup`): it is asked only when there is no
``mmcv._ext``, and an mmcv with its operators is never touched. This file then runs under the name
``mmcv._ext``.

The functions here have mmcv's names and signatures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Boxes that non-maximum suppression compares at once with all that come after them.
_BLOCK = 256


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


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Deformable attention, which mmcv calls on GPUs alone."""
    from mmlite.ops import ms_deform_attn

    return ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_locations: Tensor,
    grad_attention_weights: Tensor,
    im2col_step: int,
) -> None:
    """The gradients, written into the last three tensors."""
    from mmlite.ops import ms_deform_attn

    inputs = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = ms_deform_attn(inputs[0], spatial_shapes, *inputs[1:])
    grads = torch.autograd.grad(output, inputs, grad_output)
    for target, grad in zip((grad_value, grad_sampling_locations, grad_attention_weights), grads):
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
    """Greedy, a block of the best remaining boxes at a time."""
    rest = scores.argsort(descending=True, stable=True)
    kept = [rest[:0]]
    while len(rest):
        block, rest = rest[:_BLOCK], rest[_BLOCK:]
        overlaps = (_iou(boxes[block], boxes[block]) > iou_threshold).cpu().numpy()
        suppressed = overlaps[0] & False
        for i in range(len(block)):
            if not suppressed[i]:
                suppressed[i + 1 :] |= overlaps[i, i + 1 :]
        block = block[torch.from_numpy(~suppressed).to(block.device)]
        kept.append(block)
        overlaps_kept = _iou(boxes[block], boxes[rest]) > iou_threshold
        rest = rest[~overlaps_kept.any(0)]
    return torch.cat(kept)


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every box (N, 4) with every other (M, 4): (N, M)."""
    x1, y1, x2, y2 = first.T.contiguous()[..., None]
    u1, v1, u2, v2 = second.T.contiguous()
    intersection = torch.minimum(x2, u2).sub_(torch.maximum(x1, u1)).clamp_(min=0)
    intersection *= torch.minimum(y2, v2).sub_(torch.maximum(y1, v1)).clamp_(min=0)
    union = ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1)).sub_(intersection)
    return intersection.div_(union)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Non-maximum suppression that lowers the scores of overlapping boxes instead.

    ``method`` is 0 (naive) or 1 (linear), which act from an overlap of ``iou_threshold``, or 2
    (gaussian, of width ``sigma``). Boxes whose score falls below ``min_score`` are dropped. The
    first rows of ``dets`` (N, 5) become the kept boxes with their new scores; their indices are
    returned.
    """
    sides = boxes + boxes.new_tensor([0, 0, offset, offset])
    scores = scores.clone()
    rest = torch.arange(len(boxes))
    kept = []
    while len(rest):
        best = rest[scores[rest].argmax()]
        dets[len(kept), :4] = boxes[best]
        dets[len(kept), 4] = scores[best]
        kept.append(best)
        rest = rest[rest != best]
        iou = _iou(sides[best][None], sides[rest])[0]
        if method == 2:
            weight = (-iou.square() / sigma).exp()
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1.0)
        scores[rest] *= weight
        rest = rest[scores[rest] >= min_score]
    return torch.stack(kept) if kept else rest


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of each logit, (N, C), written into ``output``.

    ``target`` (N,) is the class, C the background; ``weight`` (C,) a factor for the rows of each
    class, or empty.
    """
    positive, factor, p, log_p, log_rest = _focal_terms(input, target, weight, alpha)
    loss = torch.where(positive, -((1 - p) ** gamma) * log_p, -(p**gamma) * log_rest)
    output.copy_(factor * loss)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of :func:`sigmoid_focal_loss_forward`, written into ``grad_input``."""
    positive, factor, p, log_p, log_rest = _focal_terms(input, target, weight, alpha)
    grad = torch.where(
        positive,
        -((1 - p) ** gamma) * (1 - p - gamma * p * log_p),
        p**gamma * (p - gamma * (1 - p) * log_rest),
    )
    grad_input.copy_(factor * grad)


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """Whether a logit is that of its row's class, its loss' factor, its p, log p and log(1 - p)."""
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)
    factor = torch.where(positive, alpha, 1 - alpha)
    if weight.numel():
        factor = factor * weight[target][:, None]
    p = input.to(torch.promote_types(input.dtype, torch.float32)).sigmoid()
    tiny = torch.finfo(p.dtype).tiny
    return positive, factor, p, p.clamp(min=tiny).log(), (1 - p).clamp(min=tiny).log()
