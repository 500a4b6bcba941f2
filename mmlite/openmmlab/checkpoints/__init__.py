"""Checkpoints: other people's formats, warm starts, safe loading."""

from ..lite_config import fitting_schedules, lite_change, lite_config, stock_config
from .loading import load_checkpoint
from .official import Conversion, convert_encoder_state, from_official, to_official, unpack
from .official_config import check_conversion, official_config
from .warm_start import WarmStart, warm_start

__all__ = [
    'Conversion',
    'WarmStart',
    'check_conversion',
    'convert_encoder_state',
    'fitting_schedules',
    'from_official',
    'lite_change',
    'lite_config',
    'load_checkpoint',
    'official_config',
    'stock_config',
    'to_official',
    'unpack',
    'warm_start',
]
