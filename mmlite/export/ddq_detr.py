"""DDQ-DETR as one function of its images, with the suppression of near queries in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn

from .graph import DetectorGraph, Pyramid, classify, decode, encode, make_pyramid, propose
from .operators import distinct_boxes


class DDQGraph(DetectorGraph):
    """DDQ-DETR: queries are the tokens whose boxes are distinct, and stay so in every layer.

    MMDetection takes what suppression leaves, a number of queries that changes from image to image.
    Here the number is the same for every image, and a mask says who is left.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.least_tokens = 0  # what is missing is filled up

    @staticmethod
    def refusals(model: nn.Module) -> Iterator[str]:
        yield from DetectorGraph.refusals(model)
        suppression = dict(model.dqs_cfg)
        if suppression != {'type': 'nms', 'iou_threshold': suppression.get('iou_threshold')}:
            yield f"dqs_cfg must be dict(type='nms', iou_threshold=...); it is {suppression}"
        if model.decoder.num_layers < 2:
            yield 'its decoder needs two layers to choose distinct queries; it has one'

    def score(self, images: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :meth:`DetectorGraph.score`. A query that is not distinct scores 0."""
        model = self.model
        pyramid = make_pyramid(model, images, image_sizes)
        memory = encode(model.encoder, pyramid)
        query, reference = self.select_queries(memory, pyramid)
        start = query, None, reference
        candidates = torch.ones_like(reference.select(-1, 0), dtype=torch.bool)

        def block(index: int, query: Tensor, boxes: Tensor) -> Tensor:
            nonlocal candidates
            scores = classify(model, index, query).sigmoid().amax(-1)
            alive = self.suppress(boxes, scores, candidates)
            # MMDetection reads who is left from what the first query may see: where that one is
            # left itself, it may see all, and so all are candidates again.
            candidates = alive | alive.narrow(1, 0, 1)
            return ~(alive.unsqueeze(1) | alive.unsqueeze(2))

        logits, boxes = decode(model, start, memory, pyramid, block=block)
        return logits.sigmoid().masked_fill(~candidates.unsqueeze(-1), 0.0), boxes

    def select_queries(self, memory: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """Queries, shape (bs, num_queries, embed_dims), and their boxes in [0, 1], cxcywh."""
        model = self.model
        batch, num_tokens, channels = memory.shape
        features, proposals = propose(model, memory, pyramid)
        branch = model.decoder.num_layers
        scores = classify(model, branch, features).sigmoid().amax(-1)
        # All boxes are needed here: suppression compares them.
        coordinates = model.bbox_head.reg_branches[branch](features) + proposals
        kept = self.suppress(coordinates.sigmoid(), scores, torch.ones_like(scores).bool())
        # Fewer may be left than there are queries: what is missing stands behind all tokens.
        nothing = scores.new_full((batch, model.num_queries), -1.0)
        ranked = torch.cat([scores.masked_fill(~kept, -1.0), nothing], 1)
        best, index = ranked.topk(model.num_queries, 1)
        missing = (best < 0).unsqueeze(-1)
        index = index.clamp(max=num_tokens - 1).unsqueeze(-1)
        query = model.query_map(memory.gather(1, index.expand(-1, -1, channels)))
        chosen = coordinates.gather(1, index.expand(-1, -1, 4))
        return query.masked_fill(missing, 0.0), chosen.masked_fill(missing, 0.0).sigmoid()

    def suppress(self, boxes: Tensor, scores: Tensor, candidates: Tensor) -> Tensor:
        """Which of the candidates are distinct, bool, (bs, n); ``boxes`` are cxcywh."""
        corners = bbox_cxcywh_to_xyxy(boxes)
        # mmcv moves the boxes of each class apart, also where all have one; we do, to round alike.
        farthest = corners.masked_fill(~candidates.unsqueeze(-1), -1.0).amax((1, 2), keepdim=True)
        scores = scores.masked_fill(~candidates, -1.0)
        threshold = float(self.model.dqs_cfg['iou_threshold'])
        return distinct_boxes(corners + (farthest + 1.0), scores, threshold, self.model.num_queries)
