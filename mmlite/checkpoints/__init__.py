"""Checkpoints: other people's formats, warm starts, safe loading."""

from .config import stock_config
from .encoder import convert_encoder_state
from .loading import load_checkpoint
from .official import Conversion, from_official, to_official, unpack
from .official_config import check_conversion, official_config
from .warm_start import WarmStart, warm_start

__all__ = [
    'Conversion',
    'WarmStart',
    'check_conversion',
    'convert_encoder_state',
    'from_official',
    'load_checkpoint',
    'official_config',
    'stock_config',
    'to_official',
    'unpack',
    'warm_start',
]
