"""Checkpoints: other people's formats, warm starts, safe loading."""

from .encoder import convert_encoder_state

__all__ = ['convert_encoder_state']
