"""A detector of MMDetection as one plain function of its images: what is traced and exported.

The same modules are called with level sizes that are ints (symbolic ones while a graph is traced),
and one tensor of image sizes describes the padding. Only what predictions need is computed: boxes
of the first stage for the chosen tokens, classes and boxes of the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models import layers
from mmdet.models.layers import inverse_sigmoid
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn

from ..nn.geometry import LevelSizes, encoder_reference_points
from ..openmmlab.families import family_of
from ..openmmlab.layers import LiteEncoder

EXPORTABLE = (
    'Deformable DETR, DINO, H-Deformable-DETR, DDQ-DETR, Grounding DINO and Mask2Former, '
    'stock and Lite'
)
# Methods of MMDetection's detectors that the functions here stand in for.
_REPLACED = ['predict', *(f'forward_{part}' for part in ('transformer', 'encoder', 'decoder'))]
_REPLACED += ['pre_transformer', 'pre_decoder']


class Pyramid(NamedTuple):
    """Flattened feature maps; ``mask`` and ``valid`` are None where there is no padding."""

    tokens: Tensor  # (bs, num_tokens, embed_dims)
    pos: Tensor  # their positional embedding, (bs or 1, num_tokens, embed_dims)
    level_sizes: LevelSizes
    mask: Tensor | None = None  # bool, True on padding, (bs, num_tokens)
    valid: Tensor | None = None  # rows and columns of the image, float32, (bs, num_levels, 2)

    @property
    def valid_ratios(self) -> Tensor | None:
        """Valid part (w, h) of every level, shape (bs, num_levels, 2)."""
        if self.valid is None:
            return None
        sides = [self.valid.new_ones(1) * side for size in self.level_sizes for side in size]
        return (self.valid / torch.cat(sides).unflatten(0, (-1, 2))).flip(-1)


class Graph(nn.Module):
    """A model, whose modules it shares, from images to what it found. Each family has its own."""

    outputs: tuple[str, ...] = ('boxes', 'scores', 'labels')
    classes: list[str] | None = None  # names of the labels, where the graph itself fixes them
    num_classes: int
    num_predictions: int  # boxes an image
    least_tokens = 0  # a pyramid of fewer is too small for the model
    described: dict[str, Any] = {}  # noqa: RUF012  (what detector.json says of this family alone)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for reason in self.refusals(model):
            raise ValueError(f'{type(model).__name__} cannot be exported: {reason}')
        self.model = model

    # Each family has these two: why the graph would compute a model wrongly, and :meth:`forward` of
    # preprocessed images, where ``inside`` is True on the image, (bs, h, w).
    refusals: Callable[[nn.Module], Iterator[str]]
    find: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, ...]]

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Inputs and outputs are those of docs/deploy.md; without padding there are no sizes."""
        inside = None
        if image_sizes is not None:
            rows, columns = valid_sides(image_sizes, images, images)
            inside = rows.unsqueeze(2) & columns.unsqueeze(1)
        preprocessor = self.model.data_preprocessor
        if getattr(preprocessor, '_channel_conversion', False):
            images = images.flip(1)
        if getattr(preprocessor, '_enable_normalize', False):
            images = (images - preprocessor.mean) / preprocessor.std
        if inside is not None:
            images = images.masked_fill(~inside.unsqueeze(1), float(preprocessor.pad_value))
        return self.find(images, image_sizes, inside)


def refusals(model: nn.Module, graph: str | None = None) -> Iterator[str]:
    """Why the functions here would compute a detector wrongly, or why it has not this graph."""
    family = family_of(model)
    if family is None or graph not in (None, family.graph):
        yield f'that works for {EXPORTABLE}'
        return
    known = {cls for kind in (family.stock, family.lite) for cls in MODELS.get(kind).__mro__}
    for method in _REPLACED:
        owner = next(cls for cls in type(model).__mro__ if method in vars(cls))
        if owner not in known:
            yield f'it has a {method} of its own; that works for {EXPORTABLE}'
    yield from encoder_refusals(model.encoder)
    if not model.bbox_head.loss_cls.use_sigmoid:
        yield 'it scores with a softmax; that works for sigmoid scores'


def encoder_refusals(encoder: nn.Module) -> Iterator[str]:
    """Why an encoder cannot be run: it is neither Lite nor stock."""
    if not isinstance(encoder, (LiteEncoder, layers.DeformableDetrTransformerEncoder)):
        yield f'its encoder is {type(encoder).__name__}; that works for {EXPORTABLE}'


class DetectorGraph(Graph):
    """Deformable DETR, DINO and H-Deformable-DETR; DDQ-DETR and Grounding DINO build on it."""

    refusals = staticmethod(refusals)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_classes = model.bbox_head.cls_out_channels
        self.least_tokens = model.num_queries if model.as_two_stage else 0

    @property
    def num_predictions(self) -> int:
        most = self.model.num_queries * self.num_classes
        return min((self.model.bbox_head.test_cfg or {}).get('max_per_img', most), most)

    def score(self, images: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores (bs, num_queries, num_classes) and boxes, cxcywh in [0, 1], of every query."""
        logits, boxes = last_layer(self.model, images, image_sizes)
        return logits.sigmoid(), boxes

    def find(self, images: Tensor, image_sizes: Tensor | None, inside: Any) -> tuple[Tensor, ...]:
        scores, boxes = self.score(images, image_sizes)
        scores, index = scores.flatten(1).topk(self.num_predictions, 1)
        labels = index % self.num_classes
        chosen = (index // self.num_classes).unsqueeze(-1)
        # A query may be chosen for several classes; so all boxes, which are few, are computed.
        boxes = bbox_cxcywh_to_xyxy(boxes.gather(1, chosen.expand(-1, -1, 4))).clamp(0, 1)
        sides = [boxes.new_full((1, 1), 1.0 * images.shape[axis]) for axis in (2, 3)]
        sizes = torch.cat(sides, 1) if image_sizes is None else image_sizes.to(boxes.dtype)
        return boxes * sizes.flip(-1).repeat(1, 2).unsqueeze(1), scores, labels


def last_layer(model: nn.Module, images: Tensor, image_sizes: Tensor | None) -> tuple:
    """What :func:`decode` gives for preprocessed images; arguments as of :meth:`Graph.forward`."""
    pyramid = make_pyramid(model, images, image_sizes)
    memory = encode(model.encoder, pyramid)
    return decode(model, select_queries(model, memory, pyramid), memory, pyramid)


def make_pyramid(model: nn.Module, images: Tensor, image_sizes: Tensor | None) -> Pyramid:
    """Backbone, neck and positional embedding of preprocessed images."""
    maps = model.extract_feat(images)
    level_sizes = [(feat.shape[-2], feat.shape[-1]) for feat in maps]
    positions, masks, valid = [], [], []
    for feat, embedding in zip(maps, model.level_embed):
        rows = columns = None
        if image_sizes is not None:
            rows, columns = valid_sides(image_sizes, images, feat)
            valid.append(torch.stack([rows.sum(1), columns.sum(1)], -1))
            masks.append(~(rows.unsqueeze(2) & columns.unsqueeze(1)).flatten(1))
        pos = sine_encoding(model.positional_encoding, feat, rows, columns)
        positions.append(pos + embedding)
    return Pyramid(
        torch.cat([feat.flatten(2).transpose(1, 2) for feat in maps], 1),
        torch.cat(positions, 1),
        level_sizes,
        torch.cat(masks, 1) if masks else None,
        torch.stack(valid, 1).float() if valid else None,
    )


def valid_sides(image_sizes: Tensor, images: Tensor, feat: Tensor) -> list[Tensor]:
    """Which rows and which columns of a map lie in each image, bool, (bs, h) and (bs, w).

    A row of the map is the row of the padded image that nearest-neighbour interpolation takes.
    """
    valid = []
    for axis in (0, 1):
        padded, side = images.shape[axis + 2], feat.shape[axis + 2]
        places = torch.arange(side, device=images.device)
        if feat is not images:
            places = (places * padded).div(side, rounding_mode='floor')
        valid.append(places.unsqueeze(0) < image_sizes.narrow(1, axis, 1))
    return valid


def sine_encoding(
    encoding: nn.Module, feat: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """MMDetection's ``SinePositionalEncoding`` of a map: (bs or 1, h * w, 2 * num_feats).

    Padding, which nothing looks at, gets other values than in MMDetection.
    """
    periods = sinusoid_periods(feat, encoding.num_feats, encoding.temperature)

    def one_axis(side: int, valid: Tensor | None) -> Tensor:
        number = torch.arange(1, side + 1, dtype=torch.float32, device=feat.device).unsqueeze(0)
        last: Tensor | float = 1.0 * side
        if valid is not None:
            last = valid.sum(1, keepdim=True).float()
            number = torch.minimum(number, last)
        if encoding.normalize:
            number = (number + encoding.offset) / (last + encoding.eps) * encoding.scale
        return sinusoids(number, periods)

    height, width = feat.shape[-2:]
    y = one_axis(height, rows).unsqueeze(2).expand(-1, -1, width, -1)
    x = one_axis(width, columns).unsqueeze(1).expand(-1, height, -1, -1)
    return torch.cat([y, x], -1).flatten(1, 2)


def sinusoid_periods(like: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """How far apart the waves of an encoding are, (channels / 2,)."""
    # Numbers, not operators: every operator of a graph takes milliseconds to export.
    return like.new_tensor([temperature ** (2 * i / channels) for i in range(channels // 2)])


def sinusoids(numbers: Tensor, periods: Tensor) -> Tensor:
    """Sines and cosines in turns of every number, (..., 2 * len(periods)), as MMDetection's."""
    angles = numbers.unsqueeze(-1) / periods
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def encode(
    encoder: nn.Module, pyramid: Pyramid, fuse: Callable | None = None, **text: Tensor | None
) -> Any:
    """The memory, (bs, num_tokens, embed_dims), by an encoder, Lite or stock.

    A Lite one takes a ``text``, too, and returns its memory behind that of the image. For a stock
    one ``fuse`` is what happens to the tokens before each layer.
    """
    tokens, pos, level_sizes, mask, _ = pyramid
    valid_ratios = pyramid.valid_ratios
    pos = pos.expand(tokens.shape[0], -1, -1)
    if isinstance(encoder, LiteEncoder):
        return encoder(tokens, pos, mask, tuple(level_sizes), None, valid_ratios, **text)
    points = encoder_reference_points(level_sizes, valid_ratios, device=tokens.device)
    for index, layer in enumerate(encoder.layers):
        tokens = layer(
            tokens if fuse is None else fuse(index, tokens),
            query_pos=pos,
            key_padding_mask=mask,
            reference_points=points,
            spatial_shapes=level_sizes,
        )
    return tokens


def select_queries(
    model: nn.Module, memory: Tensor, pyramid: Pyramid, text: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Queries, their positions (None where the decoder makes them) and points in [0, 1].

    A ``text``, (bs, num_words, embed_dims), ranks the tokens.
    """
    batch, channels = memory.shape[0], memory.shape[2]
    if not model.as_two_stage:
        query_pos, query = model.query_embedding.weight.expand(batch, -1, -1).split(channels, -1)
        return query, query_pos, model.reference_points_fc(query_pos).sigmoid()

    is_dino, branch = family_of(model).is_dino, model.decoder.num_layers
    features, proposals = propose(model, memory, pyramid)
    logits = classify(model, branch, features, text)
    # DINO ranks tokens by their best class, the others by the first one alone.
    ranked_by = logits.amax(-1) if is_dino else logits.select(-1, 0)
    chosen = ranked_by.topk(model.num_queries, 1).indices.unsqueeze(-1)
    # The box branch sees the chosen tokens alone.
    features = features.gather(1, chosen.expand(-1, -1, channels))
    proposals = proposals.expand(batch, -1, -1).gather(1, chosen.expand(-1, -1, 4))
    boxes = model.bbox_head.reg_branches[branch](features) + proposals
    reference = boxes.sigmoid()
    if is_dino:
        return model.query_embedding.weight.expand(batch, -1, -1), None, reference
    position = model.pos_trans_norm(model.pos_trans_fc(model.get_proposal_pos_embed(boxes)))
    query_pos, query = position.split(channels, -1)
    if hasattr(model, 'query_embedding'):  # H-DETR learns the contents
        learned = model.query_embedding.weight.narrow(0, 0, model.num_queries)
        query = learned.expand(batch, -1, -1)
    return query, query_pos, reference


def propose(model: nn.Module, memory: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Features of every token and logits of the box that it proposes (appendix A.4).

    Boxes are (bs or 1, num_tokens, 4), cxcywh, and infinite where the token is of no use.
    """
    proposals = []
    for level, (height, width) in enumerate(pyramid.level_sizes):
        sides = [height, width]
        if pyramid.valid is not None:
            sides = pyramid.valid.select(1, level).split(1, 1)
        y, x = (
            (torch.arange(count, dtype=torch.float32, device=memory.device) + 0.5).unsqueeze(0)
            / side
            for count, side in zip((height, width), sides)
        )
        y = y.unsqueeze(2).expand(-1, -1, width)
        x = x.unsqueeze(1).expand(-1, height, -1)
        side = torch.full_like(x, 0.05 * 2.0**level)
        proposals.append(torch.stack([x, y, side, side], -1).flatten(1, 2))
    boxes = torch.cat(proposals, 1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    if pyramid.mask is not None:
        usable = usable & ~pyramid.mask.unsqueeze(-1)
    features = memory.masked_fill(~usable, 0.0)
    logits = torch.log(boxes / (1 - boxes)).masked_fill(~usable, math.inf)
    return model.memory_trans_norm(model.memory_trans_fc(features)), logits


def classify(model: nn.Module, branch: int, features: Tensor, text: Tensor | None = None) -> Tensor:
    """Logits of classes, or of words where there is a text: (bs, n, num_classes or num_words)."""
    head = model.bbox_head.cls_branches[branch]
    if text is None:
        return head(features)
    # Grounding DINO's ContrastiveEmbed, with no words beyond those of the text.
    logits = features @ text.transpose(1, 2)
    if isinstance(head.log_scale, nn.Parameter):
        logits = logits * head.log_scale.exp()
    elif head.log_scale == 'auto':
        logits = logits / math.sqrt(features.shape[-1])
    return logits if head.bias is None else logits + head.bias


def decode(model: nn.Module, start, memory: Tensor, pyramid: Pyramid, text=None, block=None):
    """The decoder, from what :func:`select_queries` returned: logits, and boxes as cxcywh.

    Layers of Grounding DINO attend to the ``text`` (bs, num_words, embed_dims), too. ``block``
    tells from the number of a layer, its queries and their new boxes which queries must not see
    which in the next one, bool, (bs, num_queries, num_queries).
    """
    query, query_pos, reference = start
    decoder = model.decoder
    is_dino = hasattr(decoder, 'ref_point_head')
    if is_dino:
        periods = sinusoid_periods(query, 128)
        y_first = query.new_tensor([1, 0, 2, 3], dtype=torch.long)
    ratios = pyramid.valid_ratios
    num_levels = len(pyramid.level_sizes)
    blocked = None
    for index, layer in enumerate(decoder.layers):
        points = reference.unsqueeze(2)
        if ratios is not None:
            points = points * torch.cat([ratios] * (points.shape[-1] // 2), -1).unsqueeze(1)
        if is_dino:
            encoded = sinusoids(points.select(2, 0) * (2 * math.pi), periods)
            query_pos = decoder.ref_point_head(encoded.index_select(2, y_first).flatten(2))
        query = attend(layer.self_attn, query, query_pos, query, query_pos, blocked)
        query = layer.norms[0](query)
        if text is not None:
            query = layer.norms[1](attend(layer.cross_attn_text, query, query_pos, text))
        query = layer.cross_attn(
            query,
            value=memory,
            query_pos=query_pos,
            key_padding_mask=pyramid.mask,
            reference_points=points.expand(-1, -1, num_levels, -1),
            spatial_shapes=pyramid.level_sizes,
        )
        query = layer.norms[-1](layer.ffn(layer.norms[-2](query)))
        if model.with_box_refine and index < len(decoder.layers) - 1:
            offset = model.bbox_head.reg_branches[index](query)
            eps = 1e-3 if is_dino else 1e-5
            reference = refine(offset, inverse_sigmoid(reference, eps=eps))
            if block is not None:
                blocked = block(index, query, reference)
    query = decoder.norm(query) if is_dino else query
    boxes = refine(model.bbox_head.reg_branches[index](query), inverse_sigmoid(reference))
    return classify(model, index, query, text), boxes


def attend(attention: nn.Module, query, query_pos, value, key_pos=None, blocked=None) -> Tensor:
    """mmcv's ``MultiheadAttention`` to ``value`` (bs, m, embed_dims): (bs, n, embed_dims).

    ``blocked`` is True where a query must not see a value, bool, (bs, n, m).
    """
    attention = attention.attn
    key = value if key_pos is None else value + key_pos
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    heads = [
        F.linear(tokens, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for tokens, weight, bias in zip((query + query_pos, key, value), weights, biases)
    ]
    seen = None if blocked is None else ~blocked.unsqueeze(1)
    output = F.scaled_dot_product_attention(*heads, seen)
    return query + attention.out_proj(output.transpose(1, 2).flatten(2))


def refine(offset: Tensor, logits: Tensor) -> Tensor:
    """Boxes in [0, 1]: offsets (cx, cy, w, h) added to logits, then the sigmoid."""
    if logits.shape[-1] == 2:
        centre, size = offset.split(2, -1)
        return torch.cat([centre + logits, size], -1).sigmoid()
    return (offset + logits).sigmoid()
