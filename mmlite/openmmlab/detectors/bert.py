"""MMDetection 3.3's ``BertModel`` was written for transformers 4; here it learns of version 5."""

from __future__ import annotations

from typing import Any

from torch import nn


def adapt_bert(language_model: nn.Module) -> nn.Module:
    """Let a ``BertModel`` of MMDetection run with the installed transformers.

    Version 5 has another name for the tokenizer's call, and takes a mask that says which word sees
    which as (bs, 1, words, words). With version 4 nothing is changed.

    Args:
        language_model (nn.Module): MMDetection's ``BertModel``, changed in place.

    Returns:
        nn.Module: The same.
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
