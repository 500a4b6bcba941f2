"""The ways to run an encoder: as it stands, compiled, or as CUDA graphs."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..nn import InterleavedEncoder

EAGER, COMPILED, GRAPH = MODES = ('eager', 'compiled', 'graph')


def why_not(encoder: nn.Module, mode: str, device: torch.device | str) -> str:
    """Why an encoder does not run in a mode, or an empty string."""
    if mode != GRAPH:
        return ''
    if torch.device(device).type != 'cuda':
        return f'graphs are for CUDA devices, and this is {device}'
    if not isinstance(encoder, InterleavedEncoder):
        return 'it reads values back from the device, which a graph cannot hold'
    return ''


def in_mode(encoder: nn.Module, mode: str) -> nn.Module:
    """The encoder, or a copy of it that runs in another mode; it takes the same calls."""
    if mode == EAGER:
        return encoder
    encoder = copy.deepcopy(encoder)
    if mode == COMPILED:
        return torch.compile(encoder)
    encoder.replay_graphs()
    return encoder


def label(name: str, mode: str) -> str:
    """What a contestant is called in a mode."""
    return name if mode == EAGER else f'{name}, {mode}'
