"""Lite Mask2Former: the pixel decoder of its segmentation heads, for every task they serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmcv.cnn import Conv2d, ConvModule
from mmdet.models.layers import MSDeformAttnPixelDecoder, SinePositionalEncoding
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import LiteEncoder, level_sizes
from .lite import check_schedule


@MODELS.register_module()
class LiteMSDeformAttnPixelDecoder(MSDeformAttnPixelDecoder):
    """Pixel decoder of Mask2Former (arXiv 2112.01527) with the interleaved encoder.

    Instance, panoptic and video segmentation share it, so one entry of a config changes all::

        model = dict(panoptic_head=dict(pixel_decoder=dict(
            type='LiteMSDeformAttnPixelDecoder', encoder=dict(schedule='H2L1-(2+1)x3'))))

    The encoder's maps come smallest first, and stay so; the low-level ones of a schedule are the
    largest, wherever they are. Parameters have the names of MMDetection's pixel decoder.

    Args:
        in_channels (Sequence[int]): This and what follows is as in MMDetection's pixel decoder.
        strides (Sequence[int]): Not used.
        feat_channels (int): Channels of the encoder and the outputs.
        out_channels (int): Channels of the mask features.
        num_outs (int): Maps to return.
        norm_cfg (dict): Config of the convolutions' norm.
        act_cfg (dict): Config of the output convolutions' activation.
        encoder (dict): Arguments of :class:`LiteEncoder`; ``num_levels`` of its ``self_attn_cfg``
            says how many maps it takes, the smallest.
        positional_encoding (dict): Arguments of ``SinePositionalEncoding``.
        init_cfg (dict, optional): Initialisation config.

    Raises:
        ValueError: The schedule is missing or does not fit, or there are fewer maps than levels.
    """

    encoder_class = LiteEncoder

    def __init__(
        self,
        in_channels: Sequence[int] = (256, 512, 1024, 2048),
        strides: Sequence[int] = (4, 8, 16, 32),
        feat_channels: int = 256,
        out_channels: int = 256,
        num_outs: int = 3,
        norm_cfg: ConfigDict | dict | None = {'type': 'GN', 'num_groups': 32},  # noqa: B006
        act_cfg: ConfigDict | dict | None = {'type': 'ReLU'},  # noqa: B006
        encoder: ConfigDict | dict | None = None,
        positional_encoding: ConfigDict | dict = {'num_feats': 128, 'normalize': True},  # noqa: B006
        init_cfg: ConfigDict | dict | None = None,
    ) -> None:
        # Not MMDetection's constructor, which builds the stock encoder.
        BaseModule.__init__(self, init_cfg)
        name = type(self).__name__
        check_schedule(name, encoder)
        levels = encoder['layer_cfg']['self_attn_cfg']['num_levels']
        if levels > len(in_channels):
            raise ValueError(
                f'{name} has an encoder of {levels} levels, but only {len(in_channels)} maps; set '
                'num_levels of its self_attn_cfg to the number of maps, or less'
            )
        self.num_input_levels = len(in_channels)
        self.num_encoder_levels = levels
        self.num_outs = num_outs
        smallest_first = list(reversed(in_channels))

        def convolution(channels: int, kernel_size: int, bias: bool, act: dict | None):
            return ConvModule(
                channels,
                feat_channels,
                kernel_size,
                padding=kernel_size // 2,
                bias=bias,
                norm_cfg=norm_cfg,
                act_cfg=act,
            )

        self.input_convs = ModuleList(
            convolution(channels, 1, True, None) for channels in smallest_first[:levels]
        )
        self.encoder = self.encoder_class(**encoder)
        self.postional_encoding = SinePositionalEncoding(**positional_encoding)  # mmdet's name
        self.level_encoding = nn.Embedding(levels, feat_channels)
        # The larger maps are added as in a feature pyramid.
        bias = norm_cfg is None
        self.lateral_convs = ModuleList(
            convolution(channels, 1, bias, None) for channels in smallest_first[levels:]
        )
        self.output_convs = ModuleList(
            convolution(feat_channels, 3, bias, act_cfg) for _ in smallest_first[levels:]
        )
        self.mask_feature = Conv2d(feat_channels, out_channels, kernel_size=1)

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features for the masks and for the decoder.

        Args:
            feats (Sequence[Tensor]): The backbone's maps, largest first, shape
                (bs, in_channels[i], h, w) each.

        Returns:
            tuple[Tensor, list[Tensor]]: Mask features, shape (bs, out_channels, h, w) of the
            largest map, and ``num_outs`` maps, smallest first, shape (bs, feat_channels, h, w).
        """

        def position(encoding: nn.Module, feat: Tensor) -> Tensor:
            # Padding counts as image here, as in MMDetection.
            padding = feat.new_zeros((feat.shape[0], *feat.shape[2:]), dtype=torch.bool)
            return encoding(padding).flatten(2).transpose(1, 2)

        def encode(tokens: Tensor, pos: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
            return self.encoder(
                query=tokens,
                query_pos=pos,
                key_padding_mask=None,
                spatial_shapes=sizes,
                level_start_index=None,
                valid_ratios=None,
            )

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
