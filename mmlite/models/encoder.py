"""Stock encoders read by their structure, and Lite layers made of what was read."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import (
    FFN,
    EncoderSchedule,
    EncoderStep,
    InterleavedEncoder,
    LiteEncoderLayer,
    StepTokens,
)
from ..nn.attention import make_attention
from .attention import PROJECTIONS, attention_shape, is_deformable_attention

# Where repositories keep the parts of a layer: attention, two norms, the FFN's two layers and
# between them the activation; dropout behind the attention, within the FFN and behind it.
_PLACES = (
    # Deformable DETR and what was made of it.
    'self_attn norm1 norm2 linear1 linear2 activation dropout1 dropout2 dropout3',
    # mmcv 1.x and detrex.
    'attentions.0 norms.0 norms.1 ffns.0.layers.0.0 ffns.0.layers.1 ffns.0.layers.0.1 '
    'attentions.0.dropout ffns.0.layers.0.2 ffns.0.layers.2',
    # MMDetection 3 and what was made of it: MMPose.
    'self_attn norms.0 norms.1 ffn.layers.0.0 ffn.layers.1 ffn.layers.0.1 '
    'self_attn.dropout ffn.layers.0.2 ffn.layers.2',
    # transformers: Mask2Former, and Deformable DETR.
    'self_attn self_attn_layer_norm final_layer_norm fc1 fc2 activation_fn '
    'dropout activation_dropout dropout',
    'self_attn self_attn_layer_norm final_layer_norm mlp.fc1 mlp.fc2 mlp.activation_fn '
    'dropout mlp.activation_dropout dropout',
)

_MODULES = {F.relu: nn.ReLU, F.gelu: nn.GELU, F.selu: nn.SELU, F.silu: nn.SiLU}
_MODULES[torch.relu] = nn.ReLU


@dataclass
class EncoderLayerParts:
    """What a stock encoder layer is made of, wherever its model keeps it.

    Attributes:
        attention (nn.Module): The deformable attention, its layers named as usual.
        shape (tuple[int, int, int, int]): Channels, heads, levels and points of the attention.
        norms (tuple[nn.Module, nn.Module]): Behind the attention and behind the FFN.
        linears (tuple[nn.Linear, nn.Linear]): The FFN.
        activation (nn.Module): Between the two.
        dropouts (tuple[float, float, float]): Behind the attention, within the FFN, behind it.
        modules (list): All that was found.
    """

    attention: nn.Module
    shape: tuple[int, int, int, int]
    norms: tuple[nn.Module, nn.Module]
    linears: tuple[nn.Linear, nn.Linear]
    activation: nn.Module
    dropouts: tuple[float, float, float]
    modules: list[Any]

    @classmethod
    def of(cls, layer: nn.Module) -> EncoderLayerParts:
        """Read a layer; a ValueError if it has its parts under other names."""
        layer = getattr(layer, 'deformable_layer', layer)  # Grounding DINO of transformers
        for places in _PLACES:
            try:
                found = attrgetter(*places.split())(layer)
            except (AttributeError, IndexError):
                continue
            attention, norm, ffn_norm, fc1, fc2, activation, *dropouts = found
            if not isinstance(activation, nn.Module):
                if activation not in _MODULES:
                    raise ValueError(f'its activation {activation} is not known')
                activation = _MODULES[activation]()
            if is_deformable_attention(attention):
                rates = tuple(getattr(each, 'p', each) for each in dropouts)
                shape = attention_shape(attention)
                pairs = (norm, ffn_norm), (fc1, fc2)
                return cls(attention, shape, *pairs, activation, rates, list(found))
        raise ValueError(f'{type(layer).__name__} is no encoder layer of a kind that is known')

    def lite(
        self, step: EncoderStep, key_aware: bool, small_ffn: bool, proj_key: bool, same_loc: bool
    ) -> LiteEncoderLayer:
        """A Lite layer of the same sizes, with the stock layer's weights.

        Query projections and small FFNs start at random.
        """
        dropout, inner, outer = self.dropouts
        attention = make_attention(key_aware, self.shape, dropout, proj_key, same_loc)
        for name in PROJECTIONS:
            _copy(getattr(attention, name, None), getattr(self.attention, name))
        norm, ffn_norm = self.norms

        def make_ffn(channels: int | None) -> tuple[FFN, nn.Module]:
            is_relu = type(self.activation) is nn.ReLU  # the FFN's own saves memory
            module = None if is_relu else copy.deepcopy(self.activation)
            hidden = channels or self.linears[0].out_features
            ffn = FFN(self.shape[0], hidden, outer, module, inner)
            if channels is None:
                _copy(ffn.layers[0][0], self.linears[0])  # type: ignore[index]
                _copy(ffn.layers[1], self.linears[1])
            return ffn, copy.deepcopy(ffn_norm)

        norm = copy.deepcopy(norm)
        return LiteEncoderLayer(step, attention, norm, make_ffn, small_ffn, chunk_size=1024)


class StockLiteEncoder(InterleavedEncoder):
    """A Lite encoder with the sizes and weights of the stock encoder it replaces.

    The stock encoder has ``layers`` that :meth:`EncoderLayerParts.of` can read. Options are those
    of :class:`mmlite.nn.LiteEncoder`; a ValueError says what would fit instead.
    """

    smallest_first: bool | None = None  # the order of the maps, where it is always the same

    def __init__(
        self,
        stock: nn.Module,
        schedule: str | EncoderSchedule,
        *,
        key_aware: bool = True,
        small_ffn: bool = True,
        update: str = 'joint',
        num_cp: int = -1,
        proj_key: bool = False,
        same_loc: bool = False,
        elastic: Sequence[str | EncoderSchedule] = (),
    ) -> None:
        parts = [EncoderLayerParts.of(layer) for layer in stock.layers]  # type: ignore[union-attr]
        levels = parts[0].shape[2]
        EncoderSchedule.parse(schedule).check_fit(len(parts), levels, update)

        def make_layer(step: EncoderStep, index: int) -> LiteEncoderLayer:
            return parts[index].lite(step, key_aware, small_ffn, proj_key, same_loc)

        with parts[0].attention.value_proj.weight.device:  # which may be 'meta'
            super().__init__(schedule, make_layer, update, num_cp, elastic=elastic)
        if self.smallest_first is not None:
            self.level_ranks = tuple(range(levels)[:: 1 if self.smallest_first else -1])
        self.to(parts[0].attention.value_proj.weight)
        self.train(stock.training)


def encode_with_text(
    encoder: InterleavedEncoder,
    arguments: dict[str, Any],
    text: Tensor,
    text_mask: Tensor | None,
    enhance: Callable[[int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Memory and text of an encoder that fuses both before each layer, as Grounding DINO.

    The stock encoder fuses all image tokens with the text. Here only the queries of a layer are, by
    the layer's own of ``encoder.fusion_layers`` where it has them: a low-level token meets the text
    as often as it is updated. ``arguments`` are those of :meth:`InterleavedEncoder.forward`;
    ``enhance`` gets the number of a layer and the text, (bs, num_words, channels).
    """
    padding = arguments['padding_mask']

    def fuse(index: int, memory: Tensor, step_tokens: StepTokens) -> Tensor:
        nonlocal text
        if len(encoder.fusion_layers):  # type: ignore[arg-type]
            mask = None if padding is None else step_tokens.pick(padding)
            inputs = step_tokens.pick(memory), text, mask, text_mask
            fused = encoder.run(index, encoder.fusion_layers[index], *inputs)  # type: ignore[index]
            # Of transformers each with its attention weights.
            tokens, text = (each[0] if isinstance(each, tuple) else each for each in fused)
            memory = step_tokens.put_back(memory, [run for _, run in step_tokens.split(tokens)])
        text = enhance(index, text)
        return memory

    memory = InterleavedEncoder.forward(encoder, **arguments, before_layer=fuse)
    return memory, text


def use_schedule(model: nn.Module, schedule: str | EncoderSchedule) -> nn.Module:
    """Choose the schedule of a model's Lite encoders; see :func:`mmlite.use_schedule`."""
    encoders = [part for part in model.modules() if isinstance(part, InterleavedEncoder)]
    if not encoders:
        raise ValueError(f'{type(model).__name__} has no Lite encoder; to_lite gives it one')
    chosen = EncoderSchedule.parse(schedule)
    # One that has no weights for it comes first, and refuses before any is changed.
    for encoder in sorted(encoders, key=lambda each: chosen in each.schedules):
        encoder.use_schedule(chosen)
    return model


@torch.no_grad()
def copy_counterparts(
    lite: nn.Module, stock: nn.Module, encoder: str = ''
) -> tuple[list[str], list[str]]:
    """Copy into a Lite model what its stock model has, too, by names and shapes.

    Weights that are computed, such as by weight norm, are copied as they are now.

    Args:
        lite (nn.Module): The Lite model or its encoder, changed in place.
        stock (nn.Module): The stock model or its encoder.
        encoder (str): Name of the encoder in both models.

    Returns:
        tuple[list[str], list[str]]: Names of the entries copied, and of those that are new.
    """
    copied, new = [], []
    stock_layer_of = lite.get_submodule(encoder).stock_layers
    prefix = encoder and f'{encoder}.'
    # Grounding DINO has layers of three kinds.
    of_layer = re.compile(rf'({re.escape(prefix)}(?:\w+_)?layers)\.(\d+)\.(.+)')
    for name, value in lite.state_dict().items():
        match = of_layer.fullmatch(name)
        theirs = f'{match[1]}.{stock_layer_of[int(match[2])]}.{match[3]}' if match else name
        try:
            given = attrgetter(theirs)(stock)
        except AttributeError:
            given = None
        if isinstance(given, Tensor) and given.shape == value.shape:
            value.copy_(given)
            copied.append(name)
        elif name != f'{prefix}schedule_code':
            new.append(name)
    return copied, new


@torch.no_grad()
def _copy(target: nn.Module | None, source: nn.Module) -> None:
    if target is not None and target.weight.shape == source.weight.shape:  # not with same_loc
        # What is frozen stays so; new parts train.
        target.requires_grad_(any(each.requires_grad for each in source.parameters()))
        for name, value in target.named_parameters():
            value.copy_(getattr(source, name))
