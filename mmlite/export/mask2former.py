"""Mask2Former as one function of its images: instances, and panoptic maps where it makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.evaluation.functional import INSTANCE_OFFSET
from mmdet.registry import MODELS
from torch import Tensor, nn

from ..openmmlab.detectors.mask2former import decode_pixels
from ..openmmlab.families import family_of, is_lite
from .graph import Graph, Pyramid, attend, encode, encoder_refusals, sine_encoding


class SegmenterGraph(Graph):
    """From images to boxes around masks, scores, labels and masks.

    Masks are bool, (bs, num_predictions, h, w). A query that found nothing scores -1. Panoptic
    maps, where the model has them, are as in :class:`.detector.Segmentations`, (bs, h, w).
    """

    outputs = ('boxes', 'scores', 'labels', 'masks')

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.config = model.panoptic_fusion_head.test_cfg or {}
        self.num_classes = model.panoptic_head.num_classes
        self.num_predictions = self.config.get('max_per_image', 100)
        if self.config.get('panoptic_on', True):
            self.outputs += ('panoptic',)

    @staticmethod
    def refusals(model: nn.Module) -> Iterator[str]:
        decoder = model.panoptic_head.pixel_decoder
        for module, kind in (
            (model, 'Mask2Former'),
            (model.panoptic_head, 'Mask2FormerHead'),
            (model.panoptic_fusion_head, 'MaskFormerFusionHead'),
            (decoder, 'LiteMSDeformAttnPixelDecoder'),
        ):
            family = family_of(type(module), subclasses=False)
            if family is None and type(module) is not MODELS.get(kind):
                yield f'its {type(module).__name__} is no {kind}, which that works for'
        yield from encoder_refusals(decoder.encoder)
        outside = decoder.num_input_levels - decoder.num_encoder_levels
        if outside > 1 and not is_lite(decoder):
            yield f'{outside} maps lie outside its stock encoder; that works for one'

    def find(self, images: Tensor, image_sizes: Any, inside: Tensor | None) -> tuple[Tensor, ...]:
        arguments = *self.segment(images), images.shape[-2:], inside
        found = self.instances(*arguments)
        return (*found, self.panoptic(*arguments)) if 'panoptic' in self.outputs else found

    def segment(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every query (the last: no object) and of its mask at a quarter of the size."""
        head = self.model.panoptic_head
        decoder, feats = head.pixel_decoder, self.model.extract_feat(images)
        features, maps = decode_pixels(
            decoder, feats, sine_encoding, lambda *tokens: encode(decoder.encoder, Pyramid(*tokens))
        )
        maps = maps[: head.num_transformer_feat_level]
        positions = [sine_encoding(head.decoder_positional_encoding, feat) for feat in maps]
        levels = zip(head.decoder_input_projs, maps, head.level_embed.weight)
        tokens = [
            project(feat).flatten(2).transpose(1, 2) + level for project, feat, level in levels
        ]
        query = head.query_feat.weight.expand(images.shape[0], -1, -1)
        query_pos = head.query_embed.weight.expand(images.shape[0], -1, -1)

        def masks_of(query: Tensor) -> Tensor:
            embedded = head.mask_embed(head.transformer_decoder.post_norm(query))
            return (embedded @ features.flatten(2)).unflatten(2, features.shape[-2:])

        for index, layer in enumerate(head.transformer_decoder.layers):
            level = index % len(maps)
            blocked = resize(masks_of(query), maps[level].shape[-2:]).flatten(2) < 0
            # A query without a pixel sees them all.
            blocked = blocked & ~blocked.all(-1, keepdim=True)
            value, pos = tokens[level], positions[level]
            query = attend(layer.cross_attn, query, query_pos, value, pos, blocked)
            query = layer.norms[0](query)
            query = layer.norms[1](attend(layer.self_attn, query, query_pos, query, query_pos))
            query = layer.norms[2](layer.ffn(query))
        return head.cls_embed(head.transformer_decoder.post_norm(query)), masks_of(query)

    def instances(self, logits: Tensor, masks: Tensor, size, inside) -> tuple[Tensor, ...]:
        """Boxes, scores, labels and masks."""
        scores, index = logits.softmax(-1)[..., :-1].flatten(1).topk(self.num_predictions, 1)
        labels = index % self.num_classes
        upsampled = resize(take(masks, index // self.num_classes), size)
        is_set = upsampled > 0
        if inside is not None:
            is_set = is_set & inside.unsqueeze(1)
        number = is_set.float()
        rows, columns = number.sum(3), number.sum(2)
        scores = scores * (upsampled.sigmoid() * number).sum((2, 3)) / (rows.sum(2) + 1e-6)
        (top, bottom), (left, right) = first_and_last(rows > 0), first_and_last(columns > 0)
        boxes = torch.stack([left, top, right, bottom], -1)
        if self.model.num_stuff_classes:
            scores = scores.masked_fill(labels >= self.model.num_things_classes, -1.0)
        scores, order = scores.topk(self.num_predictions, 1)
        return take(boxes, order), scores, labels.gather(1, order), take(is_set, order)

    def panoptic(self, logits: Tensor, masks: Tensor, size, inside) -> Tensor:
        """The map. MMDetection draws segment after segment; here each pixel looks up its own."""
        scores, labels = logits.softmax(-1).max(-1)
        kept = (labels != self.num_classes) & (scores > self.config.get('object_mask_thr', 0.8))
        probabilities = resize(masks, size).sigmoid()
        weighed = probabilities * scores.unsqueeze(-1).unsqueeze(-1)
        owner = weighed.masked_fill(~kept.unsqueeze(-1).unsqueeze(-1), -1.0).argmax(1)  # (bs, h, w)

        high = probabilities >= 0.5
        numbers = torch.arange(masks.shape[1], device=masks.device).view(-1, 1, 1)
        own = owner.unsqueeze(1) == numbers
        if inside is not None:
            high, own = high & inside.unsqueeze(1), own & inside.unsqueeze(1)
        high_area, own_area = high.float().sum((2, 3)), own.float().sum((2, 3))
        drawn = kept & (high_area > 0) & (own_area > 0)
        drawn = drawn & (own_area / high_area.clamp(min=1) >= self.config.get('iou_thr', 0.8))

        is_thing = labels < self.model.num_things_classes
        instance = (drawn & is_thing).long().cumsum(1)
        segments = labels + is_thing.long() * instance * INSTANCE_OFFSET
        segments = segments.masked_fill(~drawn, self.num_classes)
        segment = segments.gather(1, owner.flatten(1)).unflatten(1, size)
        if self.config.get('filter_low_score', False):
            sure = probabilities.gather(1, owner.unsqueeze(1)).squeeze(1) >= 0.5
            segment = segment.masked_fill(~sure, self.num_classes)
        if inside is not None:
            segment = segment.masked_fill(~inside, self.num_classes)
        return segment


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (bs, n, ..., ...) -> (bs, n, *size)."""
    return F.interpolate(maps, size, mode='bilinear', align_corners=False)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: (bs, n, ...) and (bs, m) -> (bs, m, ...)."""
    # `gather` would want an index as large as its output.
    batch, count = tensor.shape[:2]
    first = torch.arange(batch, device=index.device).unsqueeze(1) * count
    rows = tensor.flatten(0, 1).index_select(0, (index + first).flatten())
    return rows.unflatten(0, index.shape)


def first_and_last(is_set: Tensor) -> tuple[Tensor, Tensor]:
    """First and last + 1 of the set pixels, float32 (bs, n) each; both 0 without any."""
    side = is_set.shape[-1]
    number = torch.arange(side, dtype=torch.float32, device=is_set.device).expand_as(is_set)
    last = (number + 1).masked_fill(~is_set, 0.0).amax(-1)
    first = number.masked_fill(~is_set, 1.0 * side).amin(-1)
    return torch.minimum(first, last), last
