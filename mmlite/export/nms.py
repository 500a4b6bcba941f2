"""Non-maximum suppression as an operator of fixed output size, which graphs can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from ..openmmlab.mmcv_ext import nms

_LIBRARY = torch.library.Library('mmlite', 'FRAGMENT')
_LIBRARY.define(
    'distinct_boxes(Tensor boxes, Tensor scores, float iou_threshold, SymInt most) -> Tensor'
)


def distinct_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    """Which boxes are not too near to a better one: a mask, so that no size depends on data.

    Args:
        boxes (Tensor): (x1, y1, x2, y2), float32, shape (bs, n, 4).
        scores (Tensor): float32, shape (bs, n). A box of a negative score is none.
        iou_threshold (float): A box that overlaps a better one, which is kept, by more is not kept.
        most (int): Keep only so many, the best.

    Returns:
        Tensor: bool, shape (bs, n).
    """
    return torch.ops.mmlite.distinct_boxes.default(boxes, scores, iou_threshold, most)


def _distinct_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    if boxes.dim() != 3 or boxes.shape[-1] != 4 or scores.shape != boxes.shape[:2]:
        raise ValueError(
            'boxes must be (B, N, 4) and scores (B, N); got shapes '
            f'{tuple(boxes.shape)} and {tuple(scores.shape)}'
        )
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(len(scores)):
        candidates = (scores[image] >= 0).nonzero().squeeze(1)
        chosen = nms(boxes[image, candidates], scores[image, candidates], iou_threshold, 0)
        kept[image, candidates[chosen[:most]]] = True
    return kept


for _device in ('CPU', 'CUDA'):
    _LIBRARY.impl('distinct_boxes', _distinct_boxes, _device)
_LIBRARY.impl('distinct_boxes', lambda boxes, scores, *_: scores.bool(), 'Meta')
