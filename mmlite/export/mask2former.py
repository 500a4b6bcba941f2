"""Mask2Former as one function of its images: instances, and panoptic maps where it makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.evaluation.functional import INSTANCE_OFFSET
from mmdet.models.dense_heads import Mask2FormerHead
from mmdet.models.detectors import Mask2Former
from mmdet.models.layers import MSDeformAttnPixelDecoder
from mmdet.models.seg_heads import MaskFormerFusionHead
from torch import Tensor, nn

from ..openmmlab.detectors.mask2former import LiteMSDeformAttnPixelDecoder
from .graph import (
    Pyramid,
    attend,
    check_encoder,
    image_sides,
    preprocess,
    run_encoder,
    self_attend,
    sine_encoding,
)


class SegmenterGraph(nn.Module):
    """From images to boxes, scores, labels and masks.

    Args:
        model (nn.Module): A Mask2Former of MMDetection, stock or Lite, in eval mode. Its modules
            are shared, not copied.
        normalize (bool): See :class:`.graph.DetectorGraph`.

    Raises:
        ValueError: Some part of it is none that is known.
    """

    def __init__(self, model: nn.Module, normalize: bool = True) -> None:
        super().__init__()
        check_segmenter(model)
        self.model = model
        self.normalize = normalize
        config = model.panoptic_fusion_head.test_cfg or {}
        self.num_classes = model.panoptic_head.num_classes
        self.num_predictions = config.get('max_per_image', 100)
        self.with_panoptic = bool(config.get('panoptic_on', True))
        self.outputs = ('boxes', 'scores', 'labels', 'masks')
        if self.with_panoptic:
            self.outputs += ('panoptic',)

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Segment objects.

        Args:
            images (Tensor): float32, shape (bs, 3, h, w), images at the top left of the padding.
            image_sizes (Tensor, optional): (h, w) of each image without its padding, int64, shape
                (bs, 2). None where there is no padding.

        Returns:
            tuple[Tensor, ...]: Boxes around the masks (x1, y1, x2, y2) in pixels of ``images``,
            shape (bs, num_predictions, 4); scores, best first, and labels, int64, both
            (bs, num_predictions); masks, bool, (bs, num_predictions, h, w). What is no thing scores
            -1. Where the model makes panoptic maps, the map, int64, (bs, h, w): of each pixel label
            + 1000 * instance, and the number of classes where there is nothing.
        """
        sides = image_sides(images, image_sizes)
        if self.normalize:
            images = preprocess(self.model.data_preprocessor, images, sides)
        inside = None
        if sides is not None:
            inside = sides[0].unsqueeze(2) & sides[1].unsqueeze(1)  # (bs, h, w)
        logits, masks = self.segment(images)
        size = images.shape[-2:]
        found = self.instances(logits, masks, size, inside)
        if not self.with_panoptic:
            return found
        return *found, self.panoptic(logits, masks, size, inside)

    def segment(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer says of every query.

        Args:
            images (Tensor): Preprocessed, shape (bs, 3, h, w).

        Returns:
            tuple[Tensor, Tensor]: Logits, the last for no object, (bs, num_queries,
            num_classes + 1), and those of the masks, at a quarter of the size,
            (bs, num_queries, h / 4, w / 4).
        """
        head = self.model.panoptic_head
        features, maps = decode_pixels(head.pixel_decoder, self.model.extract_feat(images))
        tokens, positions = [], []
        for level in range(head.num_transformer_feat_level):
            feat = maps[level]
            height, width = feat.shape[-2:]
            projected = head.decoder_input_projs[level](feat).flatten(2).transpose(1, 2)
            tokens.append(projected + head.level_embed.weight[level])
            encoding = head.decoder_positional_encoding
            positions.append(sine_encoding(encoding, height, width, None, None, feat).flatten(1, 2))
        batch = images.shape[0]
        query = head.query_feat.weight.expand(batch, -1, -1)
        query_pos = head.query_embed.weight.expand(batch, -1, -1)
        flat = features.flatten(2)

        def masks_of(query: Tensor) -> Tensor:
            embedded = head.mask_embed(head.transformer_decoder.post_norm(query))
            return (embedded @ flat).unflatten(2, features.shape[-2:])

        for index, layer in enumerate(head.transformer_decoder.layers):
            level = index % head.num_transformer_feat_level
            mask = resize(masks_of(query), maps[level].shape[-2:]).flatten(2)
            blocked = mask < 0
            # A query without a pixel sees them all.
            blocked = blocked & ~blocked.all(-1, keepdim=True)
            query = attend(
                layer.cross_attn, query, query_pos, tokens[level], positions[level], blocked
            )
            query = layer.norms[0](query)
            query = layer.norms[1](self_attend(layer.self_attn, query, query_pos))
            query = layer.norms[2](layer.ffn(query))
        logits = head.cls_embed(head.transformer_decoder.post_norm(query))
        return logits, masks_of(query)

    def instances(
        self, logits: Tensor, masks: Tensor, size: Sequence[int], inside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes, scores, labels and masks; see :meth:`forward`."""
        scores, index = logits.softmax(-1)[..., :-1].flatten(1).topk(self.num_predictions, 1)
        labels = index % self.num_classes
        upsampled = resize(take(masks, index // self.num_classes), size)
        is_set = upsampled > 0
        if inside is not None:
            is_set = is_set & inside.unsqueeze(1)
        number = is_set.float()
        rows, columns = number.sum(3), number.sum(2)
        area = rows.sum(2)
        scores = scores * (upsampled.sigmoid() * number).sum((2, 3)) / (area + 1e-6)
        top, bottom = first_and_last(rows > 0)
        left, right = first_and_last(columns > 0)
        boxes = torch.stack([left, top, right, bottom], -1)
        if self.model.num_stuff_classes:
            scores = scores.masked_fill(labels >= self.model.num_things_classes, -1.0)
        scores, order = scores.topk(self.num_predictions, 1)
        return take(boxes, order), scores, labels.gather(1, order), take(is_set, order)

    def panoptic(
        self, logits: Tensor, masks: Tensor, size: Sequence[int], inside: Tensor | None
    ) -> Tensor:
        """The map; see :meth:`forward`. MMDetection draws segments one after the other; here the
        segment of each pixel is looked up."""
        config = self.model.panoptic_fusion_head.test_cfg or {}
        things = self.model.num_things_classes
        scores, labels = logits.softmax(-1).max(-1)
        kept = (labels != self.num_classes) & (scores > config.get('object_mask_thr', 0.8))
        probabilities = resize(masks, size).sigmoid()
        weights = scores.masked_fill(~kept, 0.0).unsqueeze(-1).unsqueeze(-1)
        nothing = (~kept).float().unsqueeze(-1).unsqueeze(-1)
        owner = (probabilities * weights - nothing).argmax(1)  # (bs, h, w)

        high = probabilities >= 0.5
        numbers = torch.arange(masks.shape[1], device=masks.device).view(-1, 1, 1)
        own = owner.unsqueeze(1) == numbers
        if inside is not None:
            high, own = high & inside.unsqueeze(1), own & inside.unsqueeze(1)
        high_area, own_area = high.float().sum((2, 3)), own.float().sum((2, 3))
        drawn = kept & (high_area > 0) & (own_area > 0)
        drawn = drawn & (own_area / high_area.clamp(min=1) >= config.get('iou_thr', 0.8))

        is_thing = labels < things
        instance = (drawn & is_thing).long().cumsum(1)
        segments = labels + is_thing.long() * instance * INSTANCE_OFFSET
        segments = segments.masked_fill(~drawn, self.num_classes)
        segment = segments.gather(1, owner.flatten(1)).unflatten(1, size)
        if config.get('filter_low_score', False):
            sure = probabilities.gather(1, owner.unsqueeze(1)).squeeze(1) >= 0.5
            segment = segment.masked_fill(~sure, self.num_classes)
        if inside is not None:
            segment = segment.masked_fill(~inside, self.num_classes)
        return segment


def check_segmenter(model: nn.Module) -> None:
    """Refuse what :class:`SegmenterGraph` would compute wrongly.

    Raises:
        ValueError: A part of the model is none of those that are known.
    """
    parts = {
        'the model': (model, (Mask2Former,)),
        'its panoptic_head': (model.panoptic_head, (Mask2FormerHead,)),
        'its panoptic_fusion_head': (model.panoptic_fusion_head, (MaskFormerFusionHead,)),
        'its pixel_decoder': (
            model.panoptic_head.pixel_decoder,
            (MSDeformAttnPixelDecoder, LiteMSDeformAttnPixelDecoder),
        ),
    }
    for name, (part, kinds) in parts.items():
        if type(part) not in kinds:
            raise ValueError(
                f'{type(model).__name__} cannot be exported: {name} is {type(part).__name__}, and '
                f'that works for {" and ".join(kind.__name__ for kind in kinds)}'
            )
    decoder = model.panoptic_head.pixel_decoder
    check_encoder(type(decoder).__name__, decoder.encoder)
    if decoder.num_input_levels - decoder.num_encoder_levels > 1 and not isinstance(
        decoder, LiteMSDeformAttnPixelDecoder
    ):
        raise ValueError(
            f'the pixel decoder of {type(model).__name__} has '
            f'{decoder.num_input_levels - decoder.num_encoder_levels} maps outside its encoder; '
            'with the stock pixel decoder one can be exported'
        )


def decode_pixels(decoder: nn.Module, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The pixel decoder, Lite or stock: features of the masks, and maps, smallest first."""
    smallest_first = list(reversed(feats))
    tokens, positions, sizes = [], [], []
    for level, convolution in enumerate(decoder.input_convs):
        feat = smallest_first[level]
        height, width = feat.shape[-2:]
        sizes.append((height, width))
        position = sine_encoding(decoder.postional_encoding, height, width, None, None, feat)
        positions.append(position.flatten(1, 2) + decoder.level_encoding.weight[level])
        tokens.append(convolution(feat).flatten(2).transpose(1, 2))
    pyramid = Pyramid(torch.cat(tokens, 1), torch.cat(positions, 1), sizes, None, None)
    memory = run_encoder(decoder.encoder, pyramid)
    maps, start = [], 0
    for height, width in sizes:
        level = memory.narrow(1, start, height * width).transpose(1, 2)
        maps.append(level.unflatten(2, (height, width)))
        start += height * width
    larger = smallest_first[len(sizes) :]
    for lateral, output, feat in zip(decoder.lateral_convs, decoder.output_convs, larger):
        feat = lateral(feat)
        maps.append(output(feat + resize(maps[-1], feat.shape[-2:])))
    return decoder.mask_feature(maps[-1]), maps[: decoder.num_outs]


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (bs, n, ..., ...) -> (bs, n, *size)."""
    return F.interpolate(maps, size, mode='bilinear', align_corners=False)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: (bs, n, ...) and (bs, m) -> (bs, m, ...).

    ``gather`` would want an index as large as its output.
    """
    batch, count = tensor.shape[:2]
    first = torch.arange(batch, device=index.device).unsqueeze(1) * count
    rows = tensor.flatten(0, 1).index_select(0, (index + first).flatten())
    return rows.unflatten(0, index.shape)


def first_and_last(is_set: Tensor) -> tuple[Tensor, Tensor]:
    """Where a run of pixels starts, and the pixel behind its end; both 0 where none is set.

    Args:
        is_set (Tensor): bool, shape (bs, n, side).

    Returns:
        tuple[Tensor, Tensor]: float32, shape (bs, n).
    """
    side = is_set.shape[-1]
    number = torch.arange(side, dtype=torch.float32, device=is_set.device).expand_as(is_set)
    last = (number + 1).masked_fill(~is_set, 0.0).amax(-1)
    first = number.masked_fill(~is_set, 1.0 * side).amin(-1)
    return torch.minimum(first, last), last
