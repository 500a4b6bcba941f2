"""Grounding DINO as one function of its images, for a text that is fixed when it is exported.

The language model reads the text once, while the graph is built. What comes out of it is a constant
of the graph; the fusion of image and text, which depends on the image, is part of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.layers.transformer.utils import get_text_sine_pos_embed
from torch import Tensor, nn

from ..nn.geometry import encoder_reference_points
from ..openmmlab.detectors.grounding_dino import adapt_bert
from ..openmmlab.layers import LiteEncoder
from .graph import (
    DetectorGraph,
    Pyramid,
    attend,
    decode,
    make_pyramid,
    run_layer,
    select_queries,
)


class GroundingGraph(DetectorGraph):
    """Grounding DINO and MM-Grounding DINO for one text.

    Args:
        model (nn.Module): The detector, in eval mode.
        text (Sequence[str], optional): What to look for, one name a class.

    Raises:
        ValueError: There is no text, it is too long, or the detector reads it in parts or pads it,
            which is not exported.
    """

    family = 'grounding'

    def __init__(self, model: nn.Module, text: Sequence[str] | None) -> None:
        super().__init__(model)
        if not text or isinstance(text, str):
            raise ValueError(
                f'{type(model).__name__} needs a text, which is fixed in what is exported: one '
                'name a class (--text "cat . dog" on the command line)'
            )
        self.classes = list(text)
        self.num_classes = len(self.classes)
        adapt_bert(model.language_model)
        with torch.no_grad():
            tokens, prompt, _, _ = model.get_tokens_positive_and_prompts(tuple(text), True)
            words = model.language_model([prompt])
            embedded = model.text_feat_map(words['embedded'])
        # Another text needs another export.
        self.described = {'text': {'prompt': prompt, 'names': self.classes}}
        # The score of a class is the mean of those of its words.
        means = torch.zeros(model.bbox_head.max_text_len, self.num_classes)
        for label, places in tokens.items():
            if not places:
                raise ValueError(f'{self.classes[label - 1]!r} of the text has no words')
            means[places, label - 1] = 1 / len(places)
        for name, tensor in (
            ('means', means[: embedded.shape[1]].contiguous()),
            ('words', embedded),
            ('places', words['position_ids']),
            ('sees', words['masks']),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if model.test_cfg.get('chunked_size', -1) > 0:
            raise ValueError(
                f'{type(model).__name__} reads its text in parts (test_cfg.chunked_size), which '
                'cannot be exported; set it to -1 and give a shorter text'
            )
        if model.language_model.pad_to_max or not model.language_model.use_sub_sentence_represent:
            raise ValueError(
                f'the language model of {type(model).__name__} must have pad_to_max=False and '
                'use_sub_sentence_represent=True to be exported'
            )

    def score(self, images: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :meth:`DetectorGraph.score`."""
        pyramid = make_pyramid(self.model, images, image_sizes)
        memory, text = self.encode(pyramid)
        start = select_queries(self.model, memory, pyramid, text)
        logits, boxes = decode(self.model, *start, memory, pyramid, text)
        return logits.sigmoid() @ self.means, boxes

    def encode(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """The memory of the image, (bs, num_tokens, embed_dims), and that of the text."""
        encoder = self.model.encoder
        tokens, pos, level_sizes, mask, _ = pyramid
        batch = tokens.shape[0]
        pos, text, sees, places = (
            tensor.expand(batch, *tensor.shape[1:])
            for tensor in (pos, self.words, self.sees, self.places)
        )
        if isinstance(encoder, LiteEncoder):
            return encoder(
                tokens,
                pos,
                mask,
                tuple(level_sizes),
                None,
                pyramid.valid_ratios,
                memory_text=text,
                text_attention_mask=None,  # nothing of the text is padding
                position_ids=places,
                text_self_attention_masks=sees,
            )
        text_pos = get_text_sine_pos_embed(
            places.unsqueeze(-1), num_pos_feats=encoder.embed_dims, exchange_xy=False
        )
        points = encoder_reference_points(level_sizes, pyramid.valid_ratios, device=tokens.device)
        for fusion, words, layer in zip(encoder.fusion_layers, encoder.text_layers, encoder.layers):
            tokens, text = fusion(tokens, text, mask, None)
            text = words.norms[0](attend(words.self_attn, text, text_pos, text, text_pos, ~sees))
            text = words.norms[1](words.ffn(text))
            tokens = run_layer(layer, tokens, pos, points, pyramid)
        return tokens, text
