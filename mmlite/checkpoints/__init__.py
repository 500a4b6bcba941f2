"""Checkpoints: other people's formats, warm starts, safe loading."""

from .encoder import convert_encoder_state
from .loading import load_checkpoint
from .official import Conversion, from_official, to_official, unpack
from .official_config import check_conversion, official_config

__all__ = [
    'Conversion',
    'check_conversion',
    'convert_encoder_state',
    'from_official',
    'load_checkpoint',
    'official_config',
    'to_official',
    'unpack',
]
