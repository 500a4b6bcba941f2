"""The head of H-Deformable-DETR: look-forward-twice boxes and hybrid matching."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from mmdet.models.dense_heads import DeformableDETRHead
from mmdet.models.layers import inverse_sigmoid
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Targets(NamedTuple):
    """Ground truth of a batch; the objects of all images in one row."""

    boxes: Tensor  # (objects, 4), xyxy in pixels
    labels: Tensor  # (objects,), int64
    scales: Tensor  # (images, 4), width, height, width, height of each image in pixels
    counts: list[int]  # objects of each image


class Matches(NamedTuple):
    """Matched pairs of prediction and object; four int64 tensors of one length."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor  # row of Targets


@MODELS.register_module()
class HDeformableDETRHead(DeformableDETRHead):
    """Head of H-Deformable-DETR (arXiv 2207.13080, section 3.2).

    Each decoder layer has a class and a box branch of its own, and one more pair serves the
    encoder. One-to-one queries are matched with the ground truth, one-to-many queries with the
    ground truth repeated. The costs of all decoder layers and of both groups are computed
    together; only the assignment itself runs matrix by matrix.

    Args:
        one2many_repeats (int): How often the ground truth is repeated for the one-to-many queries
            (k in the paper). Defaults to 6.
        one2many_weight (float): Weight of the one-to-many losses (lambda in the paper).
            Defaults to 1.
        *args: Those of mmdet's ``DeformableDETRHead``.
        **kwargs: The same; ``loss_cls`` must work on sigmoids, and ``train_cfg.assigner`` is a
            ``HungarianAssigner``, whose costs are used.
    """

    def __init__(
        self, *args, one2many_repeats: int = 6, one2many_weight: float = 1.0, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        if not self.loss_cls.use_sigmoid:
            raise ValueError(
                f'{type(self).__name__} scores every class by its own sigmoid; set loss_cls to one '
                'with use_sigmoid=True, such as FocalLoss.'
            )
        if one2many_repeats < 1:
            raise ValueError(f'one2many_repeats={one2many_repeats}; it must be 1 or more.')
        self.one2many_repeats = one2many_repeats
        self.one2many_weight = one2many_weight

    def forward(self, hidden_states: Tensor, references: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits and boxes of every decoder layer, with look-forward-twice.

        Args:
            hidden_states (Tensor): (layers, batch, queries, embed_dims).
            references (list[Tensor]): The initial boxes and those refined by each layer,
                (batch, queries, 4) each, cxcywh in [0, 1].

        Returns:
            tuple[Tensor, Tensor]: Logits (layers, batch, queries, classes) and boxes (layers,
            batch, queries, 4), cxcywh in [0, 1].
        """
        logits, boxes = [], []
        previous = references[0]
        for layer, hidden in enumerate(hidden_states):
            offset = self.reg_branches[layer](hidden)
            logits.append(self.cls_branches[layer](hidden))
            boxes.append((offset + inverse_sigmoid(previous)).sigmoid())
            # The decoder cuts the gradient at each refinement. The next layer's box stands on this
            # same refined box with the gradient left in, so its loss also trains this layer's
            # offset (DINO, arXiv 2203.03605, section 3.5). The values do not change.
            previous = (offset + inverse_sigmoid(references[layer].detach())).sigmoid()
        return torch.stack(logits), torch.stack(boxes)

    def loss(
        self,
        hidden_states: Tensor,
        references: list[Tensor],
        enc_outputs_class: Tensor,
        enc_outputs_coord: Tensor,
        batch_data_samples: list,
        num_one2many_queries: int = 0,
    ) -> dict[str, Tensor]:
        """Losses of a batch; arguments as in mmdet, and the number of one-to-many queries."""
        return self.loss_by_feat(
            *self(hidden_states, references),
            enc_outputs_class,
            enc_outputs_coord,
            [sample.gt_instances for sample in batch_data_samples],
            [sample.metainfo for sample in batch_data_samples],
            num_one2many_queries=num_one2many_queries,
        )

    def loss_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        enc_cls_scores: Tensor,
        enc_bbox_preds: Tensor,
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        num_one2many_queries: int = 0,
    ) -> dict[str, Tensor]:
        """Losses from the predictions.

        Args:
            all_layers_cls_scores (Tensor): Logits, (layers, batch, queries, classes); the last
                ``num_one2many_queries`` queries are the one-to-many ones.
            all_layers_bbox_preds (Tensor): Boxes, (layers, batch, queries, 4), cxcywh in [0, 1].
            enc_cls_scores (Tensor): Logits of every encoder token, (batch, tokens, classes).
            enc_bbox_preds (Tensor): Boxes of every encoder token, (batch, tokens, 4).
            batch_gt_instances (list[InstanceData]): ``bboxes`` (objects, 4), xyxy in pixels, and
                ``labels`` (objects,) of each image.
            batch_img_metas (list[dict]): ``img_shape`` (height, width) of each image.
            num_one2many_queries (int): Defaults to 0.

        Returns:
            dict[str, Tensor]: ``loss_cls``, ``loss_bbox`` and ``loss_iou`` of the last layer, the
            same with ``d<i>.`` for the earlier ones, with ``enc_`` for the encoder, and with
            ``_one2many`` for the second group.
        """
        targets = self._targets(batch_gt_instances, batch_img_metas, enc_bbox_preds)
        num_objects = reduce_mean(enc_bbox_preds.new_tensor([float(sum(targets.counts))]))

        # Encoder: every token, one layer, and every object is of class 0.
        enc_targets = targets._replace(labels=torch.zeros_like(targets.labels))
        (enc_matches,) = self.match(enc_cls_scores[None], enc_bbox_preds[None], enc_targets)
        enc_losses = self._losses(
            enc_cls_scores[None], enc_bbox_preds[None], enc_targets, enc_matches, num_objects
        )
        losses = {f'enc_{name}': values[0] for name, values in enc_losses.items()}

        num_queries = all_layers_cls_scores.shape[2]
        groups = [('', num_queries - num_one2many_queries, 1, 1.0)]
        if num_one2many_queries:
            groups.append(
                ('_one2many', num_one2many_queries, self.one2many_repeats, self.one2many_weight)
            )
        group_matches = self.match(
            all_layers_cls_scores,
            all_layers_bbox_preds,
            targets,
            [(size, repeats) for _, size, repeats, _ in groups],
        )
        start = 0
        for (suffix, size, repeats, weight), matches in zip(groups, group_matches):
            group_losses = self._losses(
                all_layers_cls_scores[:, :, start : start + size],
                all_layers_bbox_preds[:, :, start : start + size],
                targets,
                matches,
                num_objects * repeats,
            )
            start += size
            for name, values in group_losses.items():
                for layer, value in enumerate(values * weight):
                    prefix = '' if layer == len(values) - 1 else f'd{layer}.'
                    losses[f'{prefix}{name}{suffix}'] = value
        return losses

    @torch.no_grad()
    def match(
        self,
        cls_scores: Tensor,
        bbox_preds: Tensor,
        targets: Targets,
        groups: list[tuple[int, int]] | None = None,
    ) -> list[Matches]:
        """Hungarian matching of several layers, images and groups of queries.

        Args:
            cls_scores (Tensor): Logits, (layers, batch, queries, classes).
            bbox_preds (Tensor): Boxes, (layers, batch, queries, 4), cxcywh in [0, 1].
            targets (Targets): The ground truth.
            groups (list[tuple[int, int]], optional): For each group of queries, in order, how many
                queries it has and how often the ground truth is repeated for it. By default all
                queries form one group without repetition.

        Returns:
            list[Matches]: One entry a group. ``query`` counts from the start of the group.
        """
        num_layers, _, num_queries, _ = cls_scores.shape
        groups = groups or [(num_queries, 1)]
        boxes = bbox_cxcywh_to_xyxy(bbox_preds.float()) * targets.scales[:, None]

        # Repeating an object repeats its column, so both groups share one cost matrix.
        costs = []
        for image, (gt_boxes, gt_labels) in enumerate(
            zip(targets.boxes.split(targets.counts), targets.labels.split(targets.counts))
        ):
            predictions = InstanceData(
                scores=cls_scores[:, image].float().flatten(0, 1),
                bboxes=boxes[:, image].flatten(0, 1),
            )
            ground_truth = InstanceData(bboxes=gt_boxes, labels=gt_labels)
            width, height = targets.scales[image, :2].tolist()
            cost = sum(
                match_cost(predictions, ground_truth, img_meta=dict(img_shape=(height, width)))
                for match_cost in self.assigner.match_costs
            )
            costs.append(cost.unflatten(0, (num_layers, num_queries)).cpu().numpy())

        first_targets = np.cumsum([0, *targets.counts[:-1]])
        matches, start = [], 0
        for size, repeats in groups:
            found = []
            for layer in range(num_layers):
                for image, cost in enumerate(costs):
                    block = np.tile(cost[layer, start : start + size], (1, repeats))
                    query, column = linear_sum_assignment(block)
                    target = first_targets[image] + column % max(targets.counts[image], 1)
                    found.append(
                        np.stack(
                            [np.full_like(query, layer), np.full_like(query, image), query, target]
                        )
                    )
            pairs = torch.from_numpy(np.concatenate(found, axis=1)).to(cls_scores.device)
            matches.append(Matches(*pairs))
            start += size
        return matches

    def _losses(
        self,
        cls_scores: Tensor,
        bbox_preds: Tensor,
        targets: Targets,
        matches: Matches,
        num_objects: Tensor,
    ) -> dict[str, Tensor]:
        """The three losses of each layer, (layers,) each; ``num_objects`` normalises them."""
        num_layers = len(cls_scores)
        avg_factor = num_objects.clamp(min=1)
        matched = (matches.layer, matches.image, matches.query)

        labels = targets.labels.new_full(cls_scores.shape[:3], self.num_classes)
        labels[matched] = targets.labels[matches.target]
        loss_cls = self.loss_cls(
            cls_scores.flatten(0, 2), labels.flatten(), reduction_override='none'
        )
        losses = dict(loss_cls=loss_cls.reshape(num_layers, -1).sum(1) / avg_factor)

        if not len(matches.query):
            # Nothing to regress to; the zero keeps the box branches in the graph, which
            # distributed training needs.
            nothing = bbox_preds.sum(dim=(1, 2, 3)) * 0
            return dict(losses, loss_bbox=nothing, loss_iou=nothing)
        boxes = bbox_preds[matched]
        gt_boxes, scales = targets.boxes[matches.target], targets.scales[matches.image]
        loss_bbox = self.loss_bbox(
            boxes, bbox_xyxy_to_cxcywh(gt_boxes / scales), reduction_override='none'
        )
        loss_iou = self.loss_iou(
            bbox_cxcywh_to_xyxy(boxes) * scales, gt_boxes, reduction_override='none'
        )
        # Every layer has the same number of pairs, in the order of the layers.
        losses['loss_bbox'] = loss_bbox.reshape(num_layers, -1).sum(1) / avg_factor
        losses['loss_iou'] = loss_iou.reshape(num_layers, -1).sum(1) / avg_factor
        return losses

    @staticmethod
    def _targets(
        batch_gt_instances: list[InstanceData], batch_img_metas: list[dict], like: Tensor
    ) -> Targets:
        sizes = [meta['img_shape'][:2] for meta in batch_img_metas]
        return Targets(
            boxes=torch.cat([instances.bboxes for instances in batch_gt_instances]),
            labels=torch.cat([instances.labels for instances in batch_gt_instances]),
            scales=like.new_tensor([[w, h, w, h] for h, w in sizes], dtype=torch.float32),
            counts=[len(instances) for instances in batch_gt_instances],
        )
