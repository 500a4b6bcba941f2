"""H-Deformable-DETR (DETRs with Hybrid Matching, arXiv 2207.13080), and its Lite variant."""

from __future__ import annotations

import torch
from mmdet.models.detectors import DeformableDETR
from mmdet.registry import MODELS
from torch import Tensor, nn

from .deformable_detr import LiteDeformableDETR


@MODELS.register_module()
class HDeformableDETR(DeformableDETR):
    """Two-stage Deformable DETR with mixed query selection and a one-to-many branch.

    In training ``num_one2many_queries`` further queries run behind the ``num_queries`` one-to-one
    queries, in the same decoder and heads. A mask keeps the two groups from attending to each
    other, and the head matches the second group with ground truth repeated several times, which
    gives the encoder and decoder many more positive examples (section 3.2 of the paper). Inference
    runs the one-to-one queries alone.

    With ``num_one2many_queries=0`` this is the paper's baseline, "Deformable DETR + tricks".

    Args:
        num_one2many_queries (int): Queries of the one-to-many branch. Defaults to 1500.
        with_box_refine (bool): Must be True.
        as_two_stage (bool): Must be True.
        *args: Those of :class:`mmdet.models.detectors.DeformableDETR`.
        **kwargs: The same; ``num_queries`` counts the one-to-one queries, and ``bbox_head`` is a
            :class:`HDeformableDETRHead`.
    """

    def __init__(
        self,
        *args,
        num_one2many_queries: int = 1500,
        with_box_refine: bool = True,
        as_two_stage: bool = True,
        **kwargs,
    ) -> None:
        if not (with_box_refine and as_two_stage):
            raise ValueError(
                f'{type(self).__name__} refines boxes and selects its queries from the encoder; '
                'set with_box_refine=True and as_two_stage=True, or leave both out'
            )
        if num_one2many_queries < 0:
            raise ValueError(
                f'num_one2many_queries={num_one2many_queries}; give 0, no one-to-many branch, or '
                'more'
            )
        self.num_one2many_queries = num_one2many_queries
        super().__init__(
            *args, with_box_refine=with_box_refine, as_two_stage=as_two_stage, **kwargs
        )

    def _init_layers(self) -> None:
        super()._init_layers()
        # Mixed query selection: what a query looks for is learned per slot, where it looks comes
        # from the proposal that fills the slot.
        self.query_embedding = nn.Embedding(
            self.num_queries + self.num_one2many_queries, self.embed_dims
        )

    def pre_decoder(
        self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Tensor
    ) -> tuple[dict, dict]:
        """Fill the query slots with the encoder's best proposals.

        Args:
            memory (Tensor): Output of the encoder, shape (bs, num_tokens, embed_dims).
            memory_mask (Tensor, optional): True on padding, shape (bs, num_tokens).
            spatial_shapes (Tensor): (h, w) of each level, shape (num_levels, 2).

        Returns:
            tuple[dict, dict]: Arguments of :meth:`forward_decoder` and, in training, of the head's
            ``loss``.

        Raises:
            ValueError: The pyramid has fewer tokens than there are queries.
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

        decoder_inputs_dict = dict(
            query=self.query_embedding.weight[:num_queries].expand(batch, -1, -1),
            query_pos=position[..., : self.embed_dims],
            memory=memory,
            reference_points=coord.sigmoid(),
            self_attn_mask=self.group_mask(num_one2many, memory.device) if num_one2many else None,
        )
        if not self.training:
            return decoder_inputs_dict, {}
        head_inputs_dict = dict(
            enc_outputs_class=enc_outputs_class,
            enc_outputs_coord=enc_outputs_coord.sigmoid(),
            num_one2many_queries=num_one2many,
        )
        return decoder_inputs_dict, head_inputs_dict

    def group_mask(self, num_one2many: int, device: torch.device) -> Tensor:
        """Self-attention mask of the decoder, which keeps the two groups of queries apart.

        Returns:
            Tensor: bool, True where a query may not look, shape (num_queries + num_one2many, ) * 2.
        """
        is_one2many = torch.arange(self.num_queries + num_one2many, device=device)
        is_one2many = is_one2many >= self.num_queries
        return is_one2many[:, None] != is_one2many[None]

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
    """H-Deformable-DETR with the interleaved encoder.

    Arguments are those of :class:`HDeformableDETR` and of :class:`LiteDetectorMixin`.
    """
