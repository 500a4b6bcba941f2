"""H-Deformable-DETR (DETRs with Hybrid Matching, arXiv 2207.13080), its Lite variant and head."""

from __future__ import annotations

import torch
from mmdet.models.dense_heads import DeformableDETRHead
from mmdet.models.detectors import DeformableDETR
from mmdet.models.layers import inverse_sigmoid
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from .deformable_detr import LiteDeformableDETR


@MODELS.register_module()
class HDeformableDETR(DeformableDETR):
    """Two-stage Deformable DETR with mixed query selection and a one-to-many branch.

    In training ``num_one2many_queries`` further queries run behind the ``num_queries`` one-to-one
    queries, in the same decoder and heads. A mask keeps the two groups from attending to each
    other, and the head matches the second group with ground truth repeated several times, for more
    positive examples (section 3.2 of the paper). Inference runs the one-to-one queries alone. With
    ``num_one2many_queries=0`` this is the paper's baseline, "Deformable DETR + tricks".

    Args:
        num_one2many_queries (int): Queries of the one-to-many branch.
        *args: Those of :class:`mmdet.models.detectors.DeformableDETR`.
        **kwargs: The same; ``with_box_refine`` and ``as_two_stage`` must be True, ``num_queries``
            counts the one-to-one queries, and ``bbox_head`` is a :class:`HDeformableDETRHead`.
    """

    def __init__(self, *args, num_one2many_queries: int = 1500, **kwargs) -> None:
        kwargs = {'with_box_refine': True, 'as_two_stage': True, **kwargs}
        if not (kwargs['with_box_refine'] and kwargs['as_two_stage']):
            raise ValueError(
                f'{type(self).__name__} refines boxes and selects its queries from the encoder; '
                'set with_box_refine=True and as_two_stage=True, or leave both out'
            )
        if num_one2many_queries < 0:
            raise ValueError(
                f'num_one2many_queries={num_one2many_queries}; give 0, for no such branch, or more'
            )
        self.num_one2many_queries = num_one2many_queries
        super().__init__(*args, **kwargs)

    def _init_layers(self) -> None:
        super()._init_layers()
        # Mixed query selection: what a query looks for is learned per slot, where it looks comes
        # from the proposal that fills the slot.
        slots = self.num_queries + self.num_one2many_queries
        self.query_embedding = nn.Embedding(slots, self.embed_dims)

    def pre_decoder(
        self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Tensor
    ) -> tuple[dict, dict]:
        """As MMDetection's, with a learned query in each slot; refuses a pyramid of fewer tokens.

        In training the head's ``loss`` also gets ``num_one2many_queries``.
        """
        num_one2many = self.num_one2many_queries if self.training else 0
        num_queries = self.num_queries + num_one2many
        batch, num_tokens, _ = memory.shape
        if num_tokens < num_queries:
            raise ValueError(
                f'{num_queries} queries need as many tokens, but the images of this batch give '
                f'{num_tokens}; use larger images or fewer queries (num_queries='
                f'{self.num_queries}, num_one2many_queries={self.num_one2many_queries})'
            )

        features, proposals = self.gen_encoder_output_proposals(memory, memory_mask, spatial_shapes)
        enc_outputs_class = self.bbox_head.cls_branches[-1](features)
        enc_outputs_coord = self.bbox_head.reg_branches[-1](features) + proposals

        # The encoder's loss labels every object 0, so channel 0 alone says "object". Its order
        # decides the slot: the best proposals go to the one-to-one queries.
        ranking = enc_outputs_class[..., 0].topk(num_queries, dim=1).indices
        coord = enc_outputs_coord.gather(1, ranking[..., None].expand(-1, -1, 4)).detach()
        position = self.get_proposal_pos_embed(coord, num_pos_feats=self.embed_dims // 2)
        position = self.pos_trans_norm(self.pos_trans_fc(position))

        decoder_inputs = dict(
            query=self.query_embedding.weight[:num_queries].expand(batch, -1, -1),
            query_pos=position[..., : self.embed_dims],
            memory=memory,
            reference_points=coord.sigmoid(),
            self_attn_mask=self.group_mask(num_one2many, memory.device) if num_one2many else None,
        )
        if not self.training:
            return decoder_inputs, {}
        return decoder_inputs, dict(
            enc_outputs_class=enc_outputs_class,
            enc_outputs_coord=enc_outputs_coord.sigmoid(),
            num_one2many_queries=num_one2many,
        )

    def group_mask(self, num_one2many: int, device: torch.device) -> Tensor:
        """Self-attention mask of the decoder: True between the two groups of queries."""
        number = torch.arange(self.num_queries + num_one2many, device=device)
        is_one2many = number >= self.num_queries
        return is_one2many[:, None] != is_one2many

    def forward_decoder(
        self, memory: Tensor, memory_mask: Tensor | None, reference_points: Tensor, **kwargs
    ) -> dict:
        """As in ``DeformableDETR``; ``self_attn_mask`` goes to the decoder, too."""
        hidden_states, references = self.decoder(
            value=memory,
            key_padding_mask=memory_mask,
            reference_points=reference_points,
            reg_branches=self.bbox_head.reg_branches,
            **kwargs,
        )
        return dict(hidden_states=hidden_states, references=[reference_points, *references])


@MODELS.register_module()
class LiteHDeformableDETR(HDeformableDETR, LiteDeformableDETR):
    """H-Deformable-DETR with the interleaved encoder."""


@MODELS.register_module()
class HDeformableDETRHead(DeformableDETRHead):
    """Head of H-Deformable-DETR (arXiv 2207.13080, section 3.2).

    Each decoder layer, and the encoder, has a class and a box branch of its own. One-to-one
    queries are matched with the ground truth, one-to-many queries with the ground truth repeated.

    Args:
        one2many_repeats (int): How often the ground truth is repeated (k in the paper).
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

        Arguments, results and their values are those of mmdet's head.
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
        """Losses of a batch, as of mmdet's head; the last queries are the one-to-many ones.

        Those of each decoder layer come a second time for them, with ``_one2many`` behind the name.
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
            for name, value in more.items():
                losses[f'{name}_one2many'] = value * self.one2many_weight
        return losses
