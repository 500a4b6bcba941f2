"""Standard and key-aware deformable attention: projections, offsets, operator, output.

The layers have the names that MMDetection's checkpoints know. Every one of them is called as a
module, so that hooks, quantisation and adapters around it work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.reference import sample, sampling_locations
from .geometry import LevelSizes

Levels = Optional[Sequence[int]]


class SamplingAttention(nn.Module):
    """What the two deformable attentions share: projected values, sampled where offsets say.

    Args:
        embed_dims (int): Channels of query and value, a multiple of ``num_heads``.
        num_heads (int): Attention heads.
        num_levels (int): Feature levels.
        num_points (int): Sampling points per head and level.
        dropout (float): Dropout on the output, before the identity is added.
        same_loc (bool): Predict one set of offsets per head and point, in pixels, and use it on
            every level.
        predicts_weights (bool): Have a layer that predicts the points' weights from the query.

    Raises:
        ValueError: ``embed_dims`` is no multiple of ``num_heads``.
    """

    attention_weights: nn.Linear | None

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        dropout: float,
        same_loc: bool = False,
        predicts_weights: bool = False,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(
                f'embed_dims must be a multiple of num_heads; got {embed_dims} and {num_heads}'
            )
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.same_loc = same_loc
        offset_levels = 1 if same_loc else num_levels
        self.sampling_offsets = nn.Linear(embed_dims, num_heads * offset_levels * num_points * 2)
        # In the order of mmcv's layers, which is that of an optimiser's state.
        self.attention_weights = (
            nn.Linear(embed_dims, num_heads * num_levels * num_points) if predicts_weights else None
        )
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        self.dropout = nn.Dropout(dropout)

    def init_weights(self) -> None:
        """Offsets start as the directional grid, projections as Xavier's with zero biases."""
        nn.init.zeros_(self.sampling_offsets.weight)
        grid = directional_grid(self.num_heads, self.num_points)  # (heads, points, 2)
        levels = 1 if self.same_loc else self.num_levels
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(grid[:, None].expand(-1, levels, -1, -1).flatten())
        _init_projections(self.value_proj, self.output_proj)

    def forward(
        self,
        query: Tensor,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        reference_points: Tensor,
        spatial_shapes: LevelSizes,
        levels: Levels = None,
    ) -> Tensor:
        """Attend to sampled points, and add the outcome to the identity.

        Args:
            query (Tensor): shape (bs, num_queries, embed_dims).
            value (Tensor, optional): The flattened pyramid, shape (bs, num_tokens, embed_dims).
                Defaults to ``query``.
            identity (Tensor, optional): Added to the output. Defaults to ``query``.
            query_pos (Tensor, optional): Positional embedding, added to ``query``.
            key_padding_mask (Tensor, optional): bool, True on padding, shape (bs, num_tokens).
            reference_points (Tensor): Normalised (x, y) or (cx, cy, w, h), shape
                (bs or 1, num_queries, num_levels, 2 or 4).
            spatial_shapes (Sequence[tuple[int, int]]): (h, w) of every level, Python ints.
            levels (Sequence[int], optional): Which of the attention's levels those are that the
                arguments speak of. Defaults to all.

        Returns:
            Tensor: shape (bs, num_queries, embed_dims).

        Raises:
            ValueError: Shapes do not fit each other.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        output = self.attend(
            query, value, key_padding_mask, reference_points, spatial_shapes, levels
        )
        return self.dropout(self.output_proj(output)) + identity

    def attend(self, query, value, mask, points, sizes, levels=None) -> Tensor:
        """What :meth:`forward` sends through the output layer.

        This and what follows takes the query with its position added; ``mask``, ``points`` and
        ``sizes`` are the padding mask, reference points and spatial shapes of :meth:`forward`.
        """
        raise NotImplementedError

    def logits(self, query, value, mask, points, sizes, levels=None) -> Tensor:
        """The attention weights before the softmax, (bs, num_queries, num_heads, all points)."""
        raise NotImplementedError

    def project(self, projection: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Project to heads, (bs, num_tokens, num_heads, head_dim), zero at padded positions."""
        projected = projection(tokens)
        if mask is not None:
            projected = projected.masked_fill(mask.unsqueeze(-1), 0.0)
        return projected.unflatten(-1, (self.num_heads, -1))

    def offsets(
        self, query: Tensor, points: Tensor, sizes: LevelSizes, levels: Levels = None
    ) -> Tensor:
        """The queries' offsets from their reference points, as the operators take them.

        Raises:
            ValueError: The number of levels is not the attention's.
        """
        wanted = self.num_levels if levels is None else len(levels)
        found = {'reference_points': points.shape[-2], 'spatial_shapes': len(sizes)}
        for name, number in found.items():
            if number != wanted:
                raise ValueError(
                    f'{name} is for {number} feature levels, '
                    f'but the attention has num_levels={wanted}'
                )
        shape = (self.num_heads, -1, self.num_points, 2)
        offsets = self.sampling_offsets(query).unflatten(-1, shape)
        return offsets if levels is None or self.same_loc else offsets[:, :, :, list(levels)]

    def locate(
        self, query: Tensor, points: Tensor, sizes: LevelSizes, levels: Levels = None
    ) -> Tensor:
        """Where the queries look; see :func:`mmlite.ops.reference.sampling_locations`."""
        offsets = SamplingAttention.offsets(self, query, points, sizes, levels)
        return sampling_locations(points, offsets, sizes)


class DeformableAttention(SamplingAttention):
    """Multi-scale deformable attention (Deformable DETR, eq. 3).

    Arguments and errors are those of :class:`SamplingAttention`.
    """

    attention_weights: nn.Linear

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            embed_dims, num_heads, num_levels, num_points, dropout, predicts_weights=True
        )
        self.init_weights()

    def init_weights(self) -> None:
        """As mmcv's: directional grid, uniform attention, Xavier projections."""
        super().init_weights()
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)

    def attend(self, query, value, mask, points, sizes, levels=None):
        weights = self.logits(query, value, mask, points, sizes, levels).softmax(-1)
        return ops.ms_deform_attn_from_offsets(
            self.project(self.value_proj, value, mask),
            sizes,
            points,
            self.offsets(query, points, sizes, levels),
            weights.unflatten(-1, (-1, self.num_points)),
        )

    def logits(self, query, value, mask, points, sizes, levels=None):
        logits = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))
        if levels is not None:
            logits = logits.unflatten(-1, (-1, self.num_points))[..., list(levels), :].flatten(-2)
        return logits


class KeyAwareDeformableAttention(SamplingAttention):
    r"""Key-aware deformable attention, KDA (Lite DETR, section 4.3).

    The offsets are predicted from the query as in standard deformable attention. Keys and values
    are sampled at the same points, and the points are weighted by
    :math:`\mathrm{softmax}(q k^T / \sqrt{d})` with q the projected query, instead of by weights
    predicted from the query alone. There is no ``attention_weights`` layer.

    Arguments and errors are those of :class:`SamplingAttention`, and

    Args:
        proj_key (bool): Project keys by a layer of their own. Off, as in the published models,
            the sampled value is its own key, and every point is sampled once.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.0,
        proj_key: bool = False,
        same_loc: bool = False,
    ) -> None:
        super().__init__(embed_dims, num_heads, num_levels, num_points, dropout, same_loc)
        self.proj_key = proj_key
        self.query_proj = nn.Linear(embed_dims, embed_dims)
        self.key_proj = nn.Linear(embed_dims, embed_dims) if proj_key else None
        self.init_weights()

    def init_weights(self) -> None:
        """Directional grid as offset bias, Xavier projections, zero biases.

        The query's projection starts at a tenth of Xavier's, so that all points weigh nearly the
        same at first, as they do in standard attention, whose weights start at zero. At full size
        a fresh attention prefers points at random, and short training ends lower (docs/results.md).
        """
        super().init_weights()
        _init_projections(self.query_proj, self.key_proj)
        with torch.no_grad():
            self.query_proj.weight.mul_(0.1)

    def attend(self, query, value, mask, points, sizes, levels=None):
        projected = self.project(self.value_proj, value, mask)
        key = projected if self.key_proj is None else self.project(self.key_proj, value, mask)
        return ops.key_aware_deform_attn_from_offsets(
            self.query_proj(query).unflatten(-1, (self.num_heads, -1)),
            key,
            projected,
            sizes,
            points,
            self.offsets(query, points, sizes, levels),
        )

    def logits(self, query, value, mask, points, sizes, levels=None):
        projection = self.value_proj if self.key_proj is None else self.key_proj
        key = self.project(projection, value, mask)
        sampled = sample(key, sizes, self.locate(query, points, sizes, levels))
        query = self.query_proj(query).unflatten(-1, (self.num_heads, -1))
        return (query.unsqueeze(-2) * sampled).sum(-1) * query.shape[-1] ** -0.5


def make_attention(
    key_aware: bool,
    shape: tuple[int, int, int, int],
    dropout: float = 0.0,
    proj_key: bool = False,
    same_loc: bool = False,
) -> SamplingAttention:
    """Key-aware or standard attention of so many channels, heads, levels and points.

    Raises:
        ValueError: ``proj_key`` or ``same_loc`` of standard attention, or the channels do not fit.
    """
    if key_aware:
        return KeyAwareDeformableAttention(*shape, dropout, proj_key, same_loc)
    if proj_key or same_loc:
        raise ValueError('proj_key and same_loc are of key-aware attention; set key_aware=True')
    return DeformableAttention(*shape, dropout)


def directional_grid(num_heads: int, num_points: int) -> Tensor:
    """Where the points of a fresh attention lie: each head looks one way, each point further.

    Returns:
        Tensor: (x, y) in pixels, the larger of the two being the point's number from 1 on, shape
        (num_heads, num_points, 2).
    """
    angles = torch.arange(num_heads, dtype=torch.float32) * (2.0 * math.pi / num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().max(-1, keepdim=True)[0]
    distances = torch.arange(1, num_points + 1, dtype=torch.float32)
    return directions[:, None] * distances[:, None]


def _init_projections(*projections: nn.Linear | None) -> None:
    for projection in filter(None, projections):
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.bias)
