"""Small models with the names and calls of the deformable detectors that stand outside frameworks.

Written for these tests. As everywhere, the operator of Deformable DETR's family is compiled and
refuses to run on a CPU, unless a test lets it.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DIMS, HEADS, POINTS = 32, 4, 2
SIZES = [(6, 8), (4, 3), (2, 3), (1, 2)]


class MSDeformAttnFunction:
    """Where tests let it run, it is :func:`ms_deform_attn_core_pytorch`."""

    runs = False

    @classmethod
    def apply(cls, value, shapes, starts, locations, weights, im2col_step):
        if not cls.runs:
            raise RuntimeError('Not implemented on the CPU')
        return ms_deform_attn_core_pytorch(value, shapes, locations, weights)


def ms_deform_attn_core_pytorch(value, shapes, locations, weights):
    batch, queries = locations.shape[:2]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes.tolist()], -1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    sampled = torch.stack(
        [
            F.grid_sample(pixels.unflatten(-1, size), grids[:, :, level], align_corners=False)
            for level, (pixels, size) in enumerate(zip(maps, shapes.tolist()))
        ],
        -2,
    )
    weighed = sampled * weights.transpose(1, 2).flatten(0, 1)[:, None]
    return weighed.sum((-2, -1)).reshape(batch, -1, queries).transpose(1, 2)


class Attention(nn.Module):
    """The layers of deformable attention, and what all repositories do with them."""

    def __init__(self, levels=4):
        super().__init__()
        self.levels = levels
        self.sampling_offsets = nn.Linear(DIMS, HEADS * levels * POINTS * 2)
        self.attention_weights = nn.Linear(DIMS, HEADS * levels * POINTS)
        self.value_proj, self.output_proj = nn.Linear(DIMS, DIMS), nn.Linear(DIMS, DIMS)
        nn.init.normal_(self.sampling_offsets.bias)

    def locate(self, points, offsets, shapes):
        points = points[:, :, None, :, None]
        if points.shape[-1] == 2:
            return points + offsets / shapes.flip(-1)[:, None]
        return points[..., :2] + offsets / POINTS * points[..., 2:] * 0.5

    def weigh(self, logits):
        return logits.softmax(-1)

    def inputs(self, query, value, points, shapes, mask):
        """What the sampler takes: value, locations, weights."""
        value = self.value_proj(value)
        if mask is not None:
            value = value.masked_fill(mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).unflatten(-1, (HEADS, self.levels, POINTS, 2))
        weights = self.weigh(self.attention_weights(query).unflatten(-1, (HEADS, -1)))
        locations = self.locate(points, offsets, shapes)
        return value.unflatten(-1, (HEADS, -1)), locations, weights.unflatten(-1, (-1, POINTS))


class MSDeformAttn(Attention):
    """Deformable DETR's."""

    def __init__(self, levels=4):
        super().__init__(levels)
        self.im2col_step = 64
        self.d_model, self.n_levels, self.n_heads, self.n_points = DIMS, levels, HEADS, POINTS

    def forward(
        self, query, reference_points, input_flatten, input_spatial_shapes,
        input_level_start_index, input_padding_mask=None
    ):  # fmt: skip
        given = query, input_flatten, reference_points, input_spatial_shapes, input_padding_mask
        value, *points = self.inputs(*given)
        levels = input_spatial_shapes, input_level_start_index
        output = MSDeformAttnFunction.apply(value, *levels, *points, self.im2col_step)
        return self.output_proj(output)


class SigmoidAttn(MSDeformAttn):
    """MOTR's option."""

    def weigh(self, logits):
        return logits.sigmoid()


class SwappedAttn(MSDeformAttn):
    """Divides by (h, w), as TrackFormer's does."""

    def locate(self, points, offsets, shapes):
        return super().locate(points, offsets, shapes.flip(-1) if points.shape[-1] == 2 else shapes)


class MultiScaleDeformableAttention(Attention):
    """mmcv's and detrex': adds its input, and takes more than it reads."""

    batch_first = True

    def __init__(self, levels=4):
        super().__init__(levels)
        self.embed_dim, self.num_levels, self.num_heads = DIMS, levels, HEADS
        self.num_points, self.dropout = POINTS, nn.Dropout(0.1)

    def forward(
        self, query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None,
        reference_points=None, spatial_shapes=None, level_start_index=None, **kwargs
    ):  # fmt: skip
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.permute(1, 0, 2), value.permute(1, 0, 2)
        given = query, value, reference_points, spatial_shapes, key_padding_mask
        value, *points = self.inputs(*given)
        output = self.output_proj(ms_deform_attn_core_pytorch(value, spatial_shapes, *points))
        output = output if self.batch_first else output.permute(1, 0, 2)
        return self.dropout(output) + identity


class SequenceFirst(MultiScaleDeformableAttention):
    batch_first = False


class Layer(nn.Module):
    """Deformable DETR's."""

    def __init__(self, attention, activation=F.relu):
        super().__init__()
        self.self_attn = attention
        self.dropout1, self.norm1 = nn.Dropout(0.1), nn.LayerNorm(DIMS)
        self.linear1, self.activation = nn.Linear(DIMS, 48), activation
        self.dropout2, self.linear2 = nn.Dropout(0.2), nn.Linear(48, DIMS)
        self.dropout3, self.norm2 = nn.Dropout(0.3), nn.LayerNorm(DIMS)

    def forward(self, src, pos, reference_points, spatial_shapes, level_start_index, mask=None):
        query = src if pos is None else src + pos
        levels = spatial_shapes, level_start_index
        src = self.norm1(
            src + self.dropout1(self.self_attn(query, reference_points, src, *levels, mask))
        )
        hidden = self.dropout2(self.activation(self.linear1(src)))
        return self.norm2(src + self.dropout3(self.linear2(hidden)))


class NamedLayer(nn.Module):
    """mmcv's and detrex'."""

    def __init__(self, attention):
        super().__init__()
        hidden = nn.Sequential(nn.Linear(DIMS, 48), nn.ReLU(), nn.Dropout(0.2))
        self.attentions = nn.ModuleList([attention])
        self.ffns = nn.ModuleList([nn.Module()])
        self.ffns[0].layers = nn.Sequential(hidden, nn.Linear(48, DIMS), nn.Dropout(0.3))
        self.norms = nn.ModuleList([nn.LayerNorm(DIMS), nn.LayerNorm(DIMS)])

    def forward(
        self, query, key=None, value=None, query_pos=None, query_key_padding_mask=None, **kwargs
    ):  # fmt: skip
        mask = dict(key_padding_mask=query_key_padding_mask, attn_mask=None)
        positions = dict(query_pos=query_pos, key_pos=query_pos)
        query = self.norms[0](
            self.attentions[0](query, query, query, None, **positions, **mask, **kwargs)
        )
        return self.norms[1](query + self.ffns[0].layers(query))


class Encoder(nn.Module):
    """Deformable DETR's, Mask2Former's, MOTR's, ..."""

    def __init__(self, layer, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))
        self.num_layers = layers

    @staticmethod
    def reference_points(shapes, ratios):
        centres = []
        for level, (h, w) in enumerate(shapes.tolist()):
            y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing='ij')
            scale = ratios[:, None, level] * torch.tensor([w, h])
            centres.append(torch.stack([x, y], -1).flatten(0, 1)[None] / scale)
        return torch.cat(centres, 1)[:, :, None] * ratios[:, None]

    def forward(
        self, src, spatial_shapes, level_start_index, valid_ratios, pos=None, padding_mask=None
    ):  # fmt: skip
        points = self.reference_points(spatial_shapes, valid_ratios)
        for layer in self.layers:
            src = layer(src, pos, points, spatial_shapes, level_start_index, padding_mask)
        return src


class DinoEncoder(Encoder):
    """Returns a tuple of three; has a norm at the end and may leave out layers."""

    def __init__(self, layer, norm=None, enc_layer_dropout_prob=None):
        super().__init__(layer)
        self.norm, self.enc_layer_dropout_prob = norm, enc_layer_dropout_prob

    def forward(
        self, src, pos, spatial_shapes, level_start_index, valid_ratios, key_padding_mask,
        ref_token_index=None, ref_token_coord=None
    ):  # fmt: skip
        levels = spatial_shapes, level_start_index, valid_ratios
        src = super().forward(src, *levels, pos, key_padding_mask)
        return (src if self.norm is None else self.norm(src)), None, None


class Fusion(nn.Module):
    """Image and text look at each other, as in Grounding DINO."""

    def __init__(self):
        super().__init__()
        self.to_image, self.to_text = nn.Linear(DIMS, DIMS), nn.Linear(DIMS, DIMS)

    def forward(self, v, l, attention_mask_v=None, attention_mask_l=None):  # noqa: E741
        logits = v @ l.transpose(1, 2) / DIMS**0.5
        per_word = logits.masked_fill(attention_mask_l[:, None], -1e9).softmax(-1)
        per_token = logits.masked_fill(attention_mask_v[..., None], -1e9).softmax(1)
        return v + self.to_image(per_word @ l), l + self.to_text(per_token.transpose(1, 2) @ v)


def get_sine_pos_embed(pos_tensor, num_pos_feats=128, exchange_xy=True):
    angles = pos_tensor * torch.logspace(0, -4, num_pos_feats // 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


class TextLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIMS, HEADS)

    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        query = src if pos is None else src + pos
        mask = src_mask.repeat_interleave(HEADS, 0)
        return src + self.self_attn(query, query, src, attn_mask=mask)[0]


class GroundingEncoder(Encoder):
    """Grounding DINO's, with checkpointing."""

    def __init__(self, layer, use_checkpoint=False):
        super().__init__(layer)
        self.fusion_layers = nn.ModuleList(Fusion() for _ in self.layers)
        self.text_layers = nn.ModuleList(TextLayer() for _ in self.layers)
        self.use_checkpoint = self.use_transformer_ckpt = use_checkpoint

    def forward(
        self, src, pos, spatial_shapes, level_start_index, valid_ratios, key_padding_mask,
        memory_text=None, text_attention_mask=None, pos_text=None,
        text_self_attention_masks=None, position_ids=None
    ):  # fmt: skip
        if position_ids is None and pos_text is None:
            position_ids = torch.arange(memory_text.shape[1]).float().expand(len(memory_text), -1)
        if position_ids is not None:
            numbers = position_ids[..., None]
            pos_text = get_sine_pos_embed(numbers, num_pos_feats=DIMS, exchange_xy=False)

        def run(layer, *inputs):
            return (
                checkpoint(layer, *inputs, use_reentrant=True)
                if self.use_checkpoint
                else layer(*inputs)
            )

        points = self.reference_points(spatial_shapes, valid_ratios)
        for layer, fusion, text_layer in zip(self.layers, self.fusion_layers, self.text_layers):
            masks = key_padding_mask, text_attention_mask
            src, memory_text = run(fusion, src, memory_text, *masks)
            memory_text = text_layer(
                src=memory_text.transpose(0, 1),
                src_mask=~text_self_attention_masks,
                src_key_padding_mask=text_attention_mask,
                pos=pos_text.transpose(0, 1),
            ).transpose(0, 1)
            levels = spatial_shapes, level_start_index
            src = run(layer, src, pos, points, *levels, key_padding_mask)
        return src, memory_text


class NamedEncoder(Encoder):
    """mmcv's and detrex': what it does not know goes to the layers by name."""

    def __init__(self, layer, post_norm_layer=None):
        super().__init__(layer)
        self.post_norm_layer = post_norm_layer

    def forward(
        self, query, key, value, query_pos=None, key_pos=None, attn_masks=None,
        query_key_padding_mask=None, key_padding_mask=None, **kwargs
    ):  # fmt: skip
        mask = query_key_padding_mask
        for layer in self.layers:
            query = layer(
                query, key, value, query_pos=query_pos, query_key_padding_mask=mask, **kwargs
            )
        return query if self.post_norm_layer is None else self.post_norm_layer(query)


class Model(nn.Module):
    """An encoder, and boxes whose queries attend to what it gives."""

    def __init__(self, encoder, cross_attn, sizes=SIZES):
        super().__init__()
        self.encoder, self.cross_attn, self.sizes = encoder, cross_attn, sizes
        self.queries = nn.Parameter(torch.randn(5, DIMS))
        self.boxes = nn.Parameter(torch.rand(5, 4))
        self.kind, self.swaps = type(encoder), isinstance(cross_attn, SequenceFirst)

    def forward(self, src, pos, mask, ratios, text):
        shapes = torch.tensor(self.sizes)
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        boxes = self.boxes[None, :, None] * torch.cat([ratios, ratios], -1)[:, None]
        queries, more = self.queries.expand(len(src), -1, -1), []
        if self.kind is NamedEncoder:
            if self.swaps:
                src, pos, queries = (each.transpose(0, 1) for each in (src, pos, queries))
            points = Encoder.reference_points(shapes, ratios)
            levels = dict(spatial_shapes=shapes, level_start_index=starts)
            kwargs = dict(query_pos=pos, query_key_padding_mask=mask, reference_points=points)
            memory = self.encoder(src, None, None, **kwargs, valid_ratios=ratios, **levels)
            kwargs = dict(reference_points=boxes, key_padding_mask=mask, query_sine_embed=queries)
            return [memory, self.cross_attn(queries, memory, memory, **kwargs, **levels)]
        if self.kind is Encoder:
            memory = self.encoder(src, shapes, starts, ratios, pos, mask)
        else:
            levels = dict(spatial_shapes=shapes, level_start_index=starts, valid_ratios=ratios)
            text = text if self.kind is GroundingEncoder else {}
            memory, *more = self.encoder(src=src, pos=pos, key_padding_mask=mask, **levels, **text)
        output = self.cross_attn(queries, boxes, memory, shapes, starts, mask)
        return [memory, output, *(each for each in more if each is not None)]


def assert_same(actual, expected) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def inputs(model):
    """Two images, one of them padded; a text of four words, and one of three."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in model.sizes)
    src, pos = torch.randn(2, 2, tokens, DIMS, generator=generator)
    mask = torch.rand(2, tokens, generator=generator) < torch.tensor([[0.0], [0.3]])
    ratios = torch.stack([torch.ones(len(model.sizes), 2), torch.full((len(model.sizes), 2), 0.75)])
    text = dict(
        memory_text=torch.randn(2, 4, DIMS, generator=generator),
        text_attention_mask=torch.tensor([[False] * 4, [False] * 3 + [True]]),
        text_self_attention_masks=torch.eye(4, dtype=torch.bool).expand(2, 4, 4),
    )
    return src, pos, mask, ratios, text


def build(kind='original', attention=None, **options):
    """A model of one of the :data:`KINDS` with random weights."""
    torch.manual_seed(0)
    encoder, layer, usual = KINDS[kind]
    attention, sizes = attention or usual, options.pop('sizes', SIZES)
    layer = layer(attention(len(sizes)), **options.pop('layer', {}))
    return Model(encoder(layer, **options), attention(len(sizes)), sizes).eval()


KINDS = {
    'original': (Encoder, Layer, MSDeformAttn),
    'dino': (DinoEncoder, Layer, MSDeformAttn),
    'grounding': (GroundingEncoder, Layer, MSDeformAttn),
    'by_name': (NamedEncoder, NamedLayer, MultiScaleDeformableAttention),
    'sequence_first': (NamedEncoder, NamedLayer, SequenceFirst),
}
