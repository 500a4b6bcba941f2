"""Lite Grounding DINO, and MM-Grounding DINO, which is the same detector trained otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.models.detectors import GroundingDINO
from mmdet.models.layers.transformer import (
    DetrTransformerEncoderLayer,
    GroundingDinoTransformerDecoder,
)
from mmdet.models.layers.transformer.utils import get_text_sine_pos_embed
from mmdet.models.utils.vlfuse_helper import SingleScaleBiAttentionBlock
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import ModuleList
from torch import Tensor, nn

from ...models import encode_with_text
from ..layers import LiteEncoder, level_sizes
from .lite import LiteDetectorMixin


class LiteGroundingDINOEncoder(LiteEncoder):
    """The interleaved encoder with Grounding DINO's fusion of image and text before each layer.

    The tokens that a layer updates and the text are updated from each other before it; the other
    tokens wait. So the cost of the fusion falls with that of the layer, and the text reads all
    tokens before a layer that updates all. The text has its own layer, as before, every time.

    Args:
        text_layer_cfg (dict): Config of the text's layers.
        fusion_layer_cfg (dict): Config of the fusion's layers.
        *args: Those of :class:`LiteEncoder`.
        **kwargs: The same. ``num_cp`` counts the fusion's layers, too.
    """

    def __init__(
        self,
        *args,
        text_layer_cfg: ConfigDict | dict,
        fusion_layer_cfg: ConfigDict | dict,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.text_layers = ModuleList(
            DetrTransformerEncoderLayer(**text_layer_cfg) for _ in self.layers
        )
        self.fusion_layers = ModuleList(
            SingleScaleBiAttentionBlock(**fusion_layer_cfg) for _ in self.layers
        )

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        level_start_index: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        *,
        memory_text: Tensor,
        text_attention_mask: Tensor,
        position_ids: Tensor,
        text_self_attention_masks: Tensor,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Encode image and text.

        Args:
            query (Tensor): This and what is not named here is as in :meth:`LiteEncoder.forward`.
            memory_text (Tensor): Tokens of the text, shape (bs, num_words, embed_dims).
            text_attention_mask (Tensor): bool, True on padding, shape (bs, num_words).
            position_ids (Tensor): Place of each word in its phrase, int, shape (bs, num_words).
            text_self_attention_masks (Tensor): bool, True where a word sees another, shape
                (bs, num_words, num_words).

        Returns:
            tuple[Tensor, Tensor]: Memory of the image and of the text, shaped as they came.
        """
        text_pos = get_text_sine_pos_embed(
            position_ids[..., None], num_pos_feats=self.embed_dims, exchange_xy=False
        )

        def enhance(index: int, text: Tensor) -> Tensor:
            layer = self.text_layers[index]
            blocked = ~text_self_attention_masks.repeat(layer.self_attn_cfg['num_heads'], 1, 1)
            return layer(text, text_pos, key_padding_mask=None, attn_mask=blocked)

        arguments = dict(
            tokens=query,
            pos=query_pos,
            level_sizes=level_sizes(spatial_shapes),
            padding_mask=key_padding_mask,
            valid_ratios=valid_ratios,
        )
        return encode_with_text(self, arguments, memory_text, text_attention_mask, enhance)


@MODELS.register_module()
class LiteGroundingDINO(LiteDetectorMixin, GroundingDINO):
    """Grounding DINO (arXiv 2303.05499) with the interleaved encoder."""

    encoder_class = LiteGroundingDINOEncoder
    decoder_class = GroundingDinoTransformerDecoder

    def _init_queries(self) -> None:
        super()._init_queries()
        self.language_model = adapt_bert(MODELS.build(self.language_model_cfg))
        self.text_feat_map = nn.Linear(
            self.language_model.language_backbone.body.language_dim, self.embed_dims
        )

    def get_positive_map(self, tokenized, tokens_positive):
        """MMDetection's; a text that the language model would cut is refused."""
        check_text_length(self, tokenized)
        return super().get_positive_map(tokenized, tokens_positive)


def check_text_length(model: nn.Module, tokenized: Mapping) -> None:
    """Refuse a text of more tokens than the language model reads: the scores would be NaN.

    ``tokenized`` is what the tokenizer of ``model``, a Grounding DINO, makes of a list of one text.
    """
    count, most = int(sum(tokenized['attention_mask'][0])), model.language_model.max_tokens
    if count > most:
        raise ValueError(
            f'the text has {count} tokens, and the language model reads {most}: give fewer names, '
            'or set model.test_cfg.chunked_size to a number of names that fit at a time (not in '
            'exports)'
        )


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """:func:`check_text_length` of names; with ``chunked_size`` the model makes several texts."""
    _, prompts, _, _ = model.get_tokens_positive_and_prompts(tuple(names), True)
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        check_text_length(model, model.language_model.tokenizer([prompt]))


def adapt_bert(language_model: nn.Module) -> nn.Module:
    """Let a ``BertModel`` of MMDetection run with the installed transformers, in place.

    MMDetection 3.3 was written for version 4. Version 5 has another name for the tokenizer's call,
    and takes a mask that says which word sees which as (bs, 1, words, words).
    """
    tokenizer = language_model.tokenizer
    if not hasattr(tokenizer, 'batch_encode_plus'):
        tokenizer.batch_encode_plus = tokenizer.__call__
        bert = language_model.language_backbone.body.model
        bert.register_forward_pre_hook(_mask_of_each_head, with_kwargs=True)
    return language_model


def _mask_of_each_head(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    mask = kwargs['attention_mask']
    if mask.dim() == 3:
        kwargs = {**kwargs, 'attention_mask': mask.bool().unsqueeze(1)}
    return args, kwargs
