"""The head of H-Deformable-DETR: look-forward-twice boxes and hybrid matching."""

from __future__ import annotations

import torch
from mmdet.models.dense_heads import DeformableDETRHead
from mmdet.models.layers import inverse_sigmoid
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor


@MODELS.register_module()
class HDeformableDETRHead(DeformableDETRHead):
    """Head of H-Deformable-DETR (arXiv 2207.13080, section 3.2).

    Each decoder layer has a class and a box branch of its own, and one more pair serves the
    encoder. One-to-one queries are matched with the ground truth, one-to-many queries with the
    ground truth repeated.

    Args:
        one2many_repeats (int): How often the ground truth is repeated for the one-to-many queries
            (k in the paper).
        one2many_weight (float): Weight of the one-to-many losses (lambda in the paper).
        *args: Those of mmdet's ``DeformableDETRHead``.
        **kwargs: The same; ``loss_cls`` must work on sigmoids.

    Raises:
        ValueError: ``loss_cls`` is a softmax, or there are fewer repeats than one.
    """

    def __init__(
        self, *args, one2many_repeats: int = 6, one2many_weight: float = 1.0, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        if not self.loss_cls.use_sigmoid:
            raise ValueError(
                f'{type(self).__name__} scores every class by its own sigmoid; set loss_cls to one '
                'with use_sigmoid=True, such as FocalLoss'
            )
        if one2many_repeats < 1:
            raise ValueError(f'one2many_repeats={one2many_repeats}; it must be 1 or more')
        self.one2many_repeats = one2many_repeats
        self.one2many_weight = one2many_weight

    def forward(self, hidden_states: Tensor, references: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits and boxes of every decoder layer, with look-forward-twice.

        Args:
            hidden_states (Tensor): shape (num_layers, bs, num_queries, embed_dims).
            references (list[Tensor]): The initial boxes and those refined by each layer, cxcywh in
                [0, 1], shape (bs, num_queries, 4) each.

        Returns:
            tuple[Tensor, Tensor]: Logits, shape (num_layers, bs, num_queries, num_classes), and
            boxes, cxcywh in [0, 1], shape (num_layers, bs, num_queries, 4).
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
        """Losses of a batch.

        Args:
            hidden_states (Tensor): This and what follows is as in mmdet's head; the last
                ``num_one2many_queries`` queries are the one-to-many ones.
            references (list[Tensor]): See :meth:`forward`.
            enc_outputs_class (Tensor): Logits of the encoder's tokens.
            enc_outputs_coord (Tensor): Boxes of the encoder's tokens, cxcywh in [0, 1].
            batch_data_samples (list[DetDataSample]): Ground truth and sizes of the images.
            num_one2many_queries (int): Size of the second group.

        Returns:
            dict[str, Tensor]: Those of mmdet's head, and for the second group the same of each
            decoder layer with ``_one2many`` behind their names.
        """
        predictions = self(hidden_states, references)
        objects = [sample.gt_instances for sample in batch_data_samples]
        metas = [sample.metainfo for sample in batch_data_samples]
        first = hidden_states.shape[2] - num_one2many_queries
        one2one = (each[:, :, :first] for each in predictions)
        losses = self.loss_by_feat(*one2one, enc_outputs_class, enc_outputs_coord, objects, metas)
        if num_one2many_queries:
            one2many = (each[:, :, first:] for each in predictions)
            k = self.one2many_repeats
            repeated = [
                InstanceData(bboxes=each.bboxes.repeat(k, 1), labels=each.labels.repeat(k))
                for each in objects
            ]
            more = self.loss_by_feat(*one2many, None, None, repeated, metas)
            weight = self.one2many_weight
            losses.update({f'{name}_one2many': value * weight for name, value in more.items()})
        return losses
