"""Checkpoints: other people's formats, warm starts, safe loading."""

from .encoder import convert_encoder_state
from .loading import load_checkpoint

__all__ = ['convert_encoder_state', 'load_checkpoint']
