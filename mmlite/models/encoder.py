"""Stock encoders read by their structure, and Lite layers made of what was read."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..nn import (
    FFN,
    DeformableAttention,
    EncoderSchedule,
    EncoderStep,
    InterleavedEncoder,
    KeyAwareDeformableAttention,
    LiteEncoderLayer,
)

# The layers of a deformable attention, by the names that all repositories have from the first one.
_PROJECTIONS = ('sampling_offsets', 'attention_weights', 'value_proj', 'output_proj')


def is_deformable_attention(module: nn.Module) -> bool:
    """Whether a module has the layers of standard deformable attention."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)


@dataclass
class EncoderLayerParts:
    """What a stock encoder layer is made of, wherever its model keeps it.

    Attributes:
        attention (nn.Module): The deformable attention, its layers named as usual.
        shape (tuple[int, int, int, int]): Channels, heads, levels and points of the attention.
        norms (tuple[nn.Module, nn.Module]): Behind the attention and behind the FFN.
        linears (tuple[nn.Linear, nn.Linear]): The FFN.
        activation (nn.Module, optional): Between the two; None is ReLU.
        dropout (float): Behind the attention and the FFN.
        activation_dropout (float): Between the two layers of the FFN.
    """

    attention: nn.Module
    shape: tuple[int, int, int, int]
    norms: tuple[nn.Module, nn.Module]
    linears: tuple[nn.Linear, nn.Linear]
    activation: nn.Module | None
    dropout: float
    activation_dropout: float

    def lite(
        self, step: EncoderStep, key_aware: bool, small_ffn: bool, proj_key: bool, same_loc: bool
    ) -> LiteEncoderLayer:
        """A Lite layer of the same sizes, with the stock layer's weights.

        Query projections and small FFNs start at random.
        """
        attention: nn.Module
        if key_aware:
            attention = KeyAwareDeformableAttention(*self.shape, self.dropout, proj_key, same_loc)
        else:
            attention = DeformableAttention(*self.shape, self.dropout)
        for name in _PROJECTIONS:
            _copy(getattr(attention, name, None), getattr(self.attention, name))
        norm, ffn_norm = self.norms

        def with_norm(channels: int) -> tuple[FFN, nn.Module]:
            rest = (self.dropout, copy.deepcopy(self.activation), self.activation_dropout)
            return FFN(self.shape[0], channels, *rest), copy.deepcopy(ffn_norm)

        has_ffn, has_small = step.ffns(small_ffn)
        ffn = with_norm(self.linears[0].out_features) if has_ffn else None
        if ffn:
            _copy(ffn[0].layers[0][0], self.linears[0])  # type: ignore[index]
            _copy(ffn[0].layers[1], self.linears[1])
        small = with_norm(self.shape[0]) if has_small else None
        return LiteEncoderLayer(step, attention, copy.deepcopy(norm), ffn, small, chunk_size=1024)


def use_schedule(model: nn.Module, schedule: str | EncoderSchedule) -> nn.Module:
    """Choose the schedule of a model's Lite encoders; see :func:`mmlite.use_schedule`."""
    encoders = [part for part in model.modules() if isinstance(part, InterleavedEncoder)]
    if not encoders:
        raise ValueError(f'{type(model).__name__} has no Lite encoder; to_lite gives it one')
    for encoder in encoders:
        encoder.use_schedule(schedule)
    return model


def stock_layers(steps: Iterable[EncoderStep]) -> list[int]:
    """For each Lite layer the stock layer that has updated the high-level tokens as often."""
    layers, updates = [], -1
    for step in steps:
        updates += step.updates_high
        layers.append(max(updates, 0))
    return layers


@torch.no_grad()
def copy_counterparts(
    lite: nn.Module, stock: nn.Module, encoder: str = ''
) -> tuple[list[str], list[str]]:
    """Copy into a Lite model what its stock model has, too, by names and shapes.

    Args:
        lite (nn.Module): The Lite model or its encoder, changed in place.
        stock (nn.Module): The stock model or its encoder.
        encoder (str): Name of the encoder in both models.

    Returns:
        tuple[list[str], list[str]]: Names of the entries copied, and of those that are new.
    """
    source, copied, new = stock.state_dict(), [], []
    stock_layer_of = stock_layers(lite.get_submodule(encoder).steps)
    prefix = encoder and f'{encoder}.'
    # Grounding DINO has layers of three kinds.
    of_layer = re.compile(rf'({re.escape(prefix)}(?:\w+_)?layers)\.(\d+)\.(.+)')
    for name, value in lite.state_dict().items():
        match = of_layer.fullmatch(name)
        theirs = f'{match[1]}.{stock_layer_of[int(match[2])]}.{match[3]}' if match else name
        if theirs in source and source[theirs].shape == value.shape:
            value.copy_(source[theirs])
            copied.append(name)
        elif name != f'{prefix}schedule_code':
            new.append(name)
    return copied, new


@torch.no_grad()
def _copy(target: nn.Module | None, source: nn.Module) -> None:
    if target is not None and target.weight.shape == source.weight.shape:  # not with same_loc
        target.load_state_dict(source.state_dict())
