"""Grounding DINO as one function of its images, for one text.

The language model reads the text while the graph is built, and its output is a constant. The fusion
of image and text is part of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from mmdet.models.layers.transformer.utils import get_text_sine_pos_embed
from torch import Tensor, nn

from ..openmmlab.detectors.grounding_dino import adapt_bert, check_text_length
from ..openmmlab.families import is_lite
from .graph import DetectorGraph, Pyramid, attend, decode, encode, make_pyramid, select_queries


class GroundingGraph(DetectorGraph):
    """Grounding DINO and MM-Grounding DINO for one ``text``, one name a class."""

    def __init__(self, model: nn.Module, text: Sequence[str] | None) -> None:
        super().__init__(model)
        if not text or isinstance(text, str) or not all(map(str.strip, text)):
            how = 'one name a class (--text "cat . dog" on the command line)'
            raise ValueError(f'{type(model).__name__} needs a text, which the export fixes: {how}')
        self.classes = list(text)
        self.num_classes = len(self.classes)
        adapt_bert(model.language_model)
        with torch.no_grad():
            tokens, prompt, _, _ = model.get_tokens_positive_and_prompts(tuple(text), True)
            check_text_length(model, model.language_model.tokenizer([prompt]))
            words = model.language_model([prompt])
            embedded = model.text_feat_map(words['embedded'])
        self.described = {'text': {'prompt': prompt, 'names': self.classes}}
        # The score of a class is the mean of those of its words.
        means = torch.zeros(embedded.shape[1], self.num_classes)
        for label, places in tokens.items():
            if not places:
                raise ValueError(f'{self.classes[label - 1]!r} of the text has no words')
            means[places, label - 1] = 1 / len(places)
        self.register_buffer('means', means, persistent=False)
        self.register_buffer('words', embedded, persistent=False)
        self.register_buffer('places', words['position_ids'], persistent=False)
        self.register_buffer('sees', words['masks'], persistent=False)

    @staticmethod
    def refusals(model: nn.Module) -> Iterator[str]:
        yield from DetectorGraph.refusals(model)
        if model.test_cfg.get('chunked_size', -1) > 0:
            yield 'it reads its text in parts; set test_cfg.chunked_size=-1 and give a shorter text'
        if model.language_model.pad_to_max or not model.language_model.use_sub_sentence_represent:
            yield 'its language_model needs pad_to_max=False and use_sub_sentence_represent=True'

    def score(self, images: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :meth:`DetectorGraph.score`."""
        pyramid = make_pyramid(self.model, images, image_sizes)
        memory, text = self.encode(pyramid)
        start = select_queries(self.model, memory, pyramid, text)
        logits, boxes = decode(self.model, start, memory, pyramid, text)
        return logits.sigmoid() @ self.means, boxes

    def encode(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """The memory of the image, (bs, num_tokens, embed_dims), and that of the text."""
        encoder, batch = self.model.encoder, pyramid.tokens.shape[0]
        constants = self.words, self.sees, self.places
        text, sees, places = (one.expand(batch, *one.shape[1:]) for one in constants)
        if is_lite(self.model):
            return encode(
                encoder,
                pyramid,
                memory_text=text,
                text_attention_mask=None,  # nothing of the text is padding
                position_ids=places,
                text_self_attention_masks=sees,
            )
        text_pos = get_text_sine_pos_embed(
            places.unsqueeze(-1), num_pos_feats=encoder.embed_dims, exchange_xy=False
        )

        def fuse(index: int, tokens: Tensor) -> Tensor:
            nonlocal text
            tokens, text = encoder.fusion_layers[index](tokens, text, pyramid.mask, None)
            layer = encoder.text_layers[index]
            text = layer.norms[0](attend(layer.self_attn, text, text_pos, text, text_pos, ~sees))
            text = layer.norms[1](layer.ffn(text))
            return tokens

        memory = encode(encoder, pyramid, fuse)
        return memory, text
