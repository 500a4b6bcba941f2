"""The deformable attention of transformers' models on :func:`mmlite.ops.ms_deform_attn`.

Each model folder of transformers has its own code with ``grid_sample`` and reaches it in one of
three ways, which :func:`_fused_class` knows. The module that samples becomes an instance of a
subclass of its own class: all else stays, and the way back is to give it its class again.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from .. import models, ops
from ..models import Fused
from ..nn.geometry import LevelSizes

# The oldest version that was tried with success: earlier ones name and call things differently.
OLDEST = Version('5.18')


def fuse(model: nn.Module) -> nn.Module:
    """Let a model's deformable attention run on our operators; see :func:`mmlite.fuse`.

    Saving, loading, copying and pickling go on working. An attention that reads the nearest pixel
    (``decoder_method='discrete'``) is another function, and refused; an ImportError says that the
    installed transformers is too old.
    """
    check_version()
    return models.fuse(model, _serve)


def _serve(module: nn.Module) -> type[nn.Module] | None:
    fused = _fused_class(type(module))
    method = getattr(module, 'method', getattr(module, 'decoder_method', 'default'))
    if fused and method != 'default':
        raise ValueError(
            "it reads the nearest pixel and mmlite.ops interpolates; only decoder_method='default' "
            'can be served'
        )
    return fused


def check_version() -> None:
    """Refuse with an ImportError a transformers that is too old or not there."""
    try:
        from transformers import __version__ as found
    except ImportError:
        found = None
    if found is None or Version(found) < OLDEST:
        what = f'{found} is too old' if found else 'is not installed'
        how = f"pip install 'transformers>={OLDEST}'"
        raise ImportError(f'transformers {what}; mmlite needs {OLDEST} or later: {how}')


@cache
def _fused_class(stock: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of a module class that samples with our operator; None if it does not sample."""
    if not stock.__module__.startswith('transformers.'):
        return None
    names = getattr(getattr(stock.forward, '__code__', None), 'co_names', ())
    if 'value_spatial_shapes_list' in inspect.signature(stock.forward).parameters:
        # A module without parameters that only samples: Deformable DETR, RT-DETR, ...
        changed = {'forward': _forward_sampler}
    elif 'ms_deformable_attn_core' in names:
        # A function kept as an attribute of the instance, which a property hides: D-FINE, ...
        changed = {'ms_deformable_attn_core': property(lambda module: _sample_by_level)}
    elif _SAMPLERS.keys() & set(names):
        # A function of the file the class is in: Mask2Former, OneFormer, RT-DETRv2.
        changed = {'forward': _with_samplers(stock.forward)}
    else:
        return None
    changed['made_by'] = (_fused_class, stock)
    return type(f'Fused{stock.__name__}', (Fused, stock), changed)


def _with_samplers(function: FunctionType) -> FunctionType:
    """A copy of a function that calls ours where it would call transformers' samplers."""
    namespace = {**function.__globals__, **_SAMPLERS}
    # torch.compile would look the names up in the module of this name.
    del namespace['__name__']
    code, name, defaults = function.__code__, function.__name__, function.__defaults__
    copy = FunctionType(code, namespace, name, defaults, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _forward_sampler(self, value, shapes, sizes, starts, locations, weights, im2col_step) -> Tensor:
    """transformers' ``MultiScaleDeformableAttention``: its shapes are our operator's."""
    return ops.ms_deform_attn(value, sizes, locations, weights)


def _sample_by_level(
    value: Tensor,
    sizes: LevelSizes,
    locations: Tensor,
    weights: Tensor,
    points_of_levels: list[int],
    method: str = 'default',
) -> Tensor:
    """transformers' ``multi_scale_deformable_attention_v2``: each level has its number of points.

    They lie side by side, in ``locations`` (B, Q, M, all points, 2) and ``weights`` (B, Q, M, ...).
    """
    points = max(points_of_levels)
    if min(points_of_levels) < points:
        # The missing points lie outside the map and weigh nothing.
        missing = [points - count for count in points_of_levels]
        pairs = zip(locations.split(points_of_levels, -2), missing)
        locations = torch.cat(
            [F.pad(level, (0, 0, 0, more), value=-1.0) for level, more in pairs], -2
        )
        pairs = zip(weights.split(points_of_levels, -1), missing)
        weights = torch.cat([F.pad(level, (0, more)) for level, more in pairs], -1)
    shape = (len(points_of_levels), points)
    locations, weights = locations.unflatten(-2, shape), weights.unflatten(-1, shape)
    return ops.ms_deform_attn(value, sizes, locations, weights)


# The functions of transformers, by name, and ours in their place.
_SAMPLERS = {
    'multi_scale_deformable_attention': lambda *arguments: ops.ms_deform_attn(*arguments),
    'multi_scale_deformable_attention_v2': _sample_by_level,
}
