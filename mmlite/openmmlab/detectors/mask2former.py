"""Lite Mask2Former: the pixel decoder of its segmentation heads, for every task they serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmdet.models.layers import MSDeformAttnPixelDecoder
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import LiteEncoder, level_sizes
from .lite import checked_levels


@MODELS.register_module()
class LiteMSDeformAttnPixelDecoder(MSDeformAttnPixelDecoder):
    """Pixel decoder of Mask2Former (arXiv 2112.01527) with the interleaved encoder.

    Instance, panoptic and video segmentation share it. The encoder's maps come smallest first, and
    stay so; the low-level ones of a schedule are the largest, wherever they are. Parameters have
    the names of MMDetection's pixel decoder.

    Args:
        in_channels (Sequence[int]): Of the backbone's maps, largest map first.
        encoder (dict): Arguments of :class:`LiteEncoder`; ``num_levels`` of its ``self_attn_cfg``
            says how many maps it takes, the smallest.
        **kwargs: Further arguments of MMDetection's pixel decoder.

    Raises:
        ValueError: The schedule is missing or does not fit, or there are fewer maps than levels.
    """

    encoder_class = LiteEncoder

    def __init__(
        self,
        in_channels: Sequence[int] = (256, 512, 1024, 2048),
        *,
        encoder: ConfigDict | dict,
        **kwargs,
    ) -> None:
        name = type(self).__name__
        levels = checked_levels(name, encoder)
        if levels > len(in_channels):
            raise ValueError(
                f'{name} has an encoder of {levels} levels, but only {len(in_channels)} maps; set '
                'num_levels of its self_attn_cfg to the number of maps, or less'
            )
        # MMDetection's constructor wants an encoder to build: a layer, whose place ours takes.
        stock = ConfigDict(num_layers=1, layer_cfg=dict(self_attn_cfg=dict(num_levels=levels)))
        super().__init__(in_channels, encoder=stock, **kwargs)
        self.encoder = self.encoder_class(**encoder)

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features for the masks and for the decoder, of the backbone's maps, largest first.

        Mask features are (bs, out_channels, h, w) of the largest map; the decoder gets ``num_outs``
        maps, smallest first, (bs, feat_channels, h, w).
        """

        def position(encoding: nn.Module, feat: Tensor) -> Tensor:
            # Padding counts as image here, as in MMDetection.
            padding = feat.new_zeros((feat.shape[0], *feat.shape[2:]), dtype=torch.bool)
            return encoding(padding).flatten(2).transpose(1, 2)

        def encode(tokens: Tensor, pos: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
            return self.encoder(tokens, pos, None, sizes)

        return decode_pixels(self, feats, position, encode)


def decode_pixels(
    decoder: nn.Module,
    feats: Sequence[Tensor],
    position: Callable[[nn.Module, Tensor], Tensor],
    encode: Callable[[Tensor, Tensor, Sequence[tuple[int, int]]], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Run a pixel decoder, Lite or stock; see :meth:`LiteMSDeformAttnPixelDecoder.forward`.

    ``position`` gives the positional encoding of a map, (bs or 1, h * w, feat_channels). ``encode``
    makes the memory of tokens, their positions and the sizes of their levels.
    """
    smallest_first = list(reversed(feats))
    tokens, positions = [], []
    encoded = smallest_first[: len(decoder.input_convs)]
    sizes = level_sizes([(feat.shape[-2], feat.shape[-1]) for feat in encoded])
    for level, (convolution, feat) in enumerate(zip(decoder.input_convs, encoded)):
        encoding = position(decoder.postional_encoding, feat)
        positions.append(encoding + decoder.level_encoding.weight[level])
        tokens.append(convolution(feat).flatten(2).transpose(1, 2))
    memory = encode(torch.cat(tokens, 1), torch.cat(positions, 1), sizes)
    maps = [
        level.transpose(1, 2).unflatten(2, size)
        for level, size in zip(memory.split([h * w for h, w in sizes], 1), sizes)
    ]
    larger = smallest_first[len(sizes) :]
    for lateral, output, feat in zip(decoder.lateral_convs, decoder.output_convs, larger):
        feat = lateral(feat)
        # As it comes out of the tokens, channels last, resizing takes thrice as long on CPUs.
        above = maps[-1].contiguous()
        above = F.interpolate(above, feat.shape[-2:], mode='bilinear', align_corners=False)
        maps.append(output(feat + above))
    return decoder.mask_feature(maps[-1]), maps[: decoder.num_outs]
