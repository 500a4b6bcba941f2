"""The deformable attention of transformers' models on :func:`mmlite.ops.ms_deform_attn`.

transformers samples with ``grid_sample``, in code that each model folder has a copy of and reaches
in one of three ways; :func:`_fused_class` knows them. The module that samples becomes an instance
of a subclass of its own class: its parameters, its name and everything else it does stay, no other
model is touched, and the way back is to give it its class again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import cache
from types import FunctionType

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from .. import ops
from ..models import changing
from ..nn import InterleavedEncoder

LevelSizes = Sequence[tuple[int, int]]

# The oldest version that was tried with success: earlier ones name and call things differently.
OLDEST = Version('5.18')


def fuse(model: nn.Module) -> nn.Module:
    """Let a model's deformable attention run through :func:`mmlite.ops.ms_deform_attn`.

    Changes, in place, every deformable attention of transformers in ``model``. Parameters, their
    names and the numbers stay the same, in training and inference, and so do saving, loading,
    copying and pickling. The kernels of the device are used, PyTorch where it has none.

    Args:
        model (nn.Module): A model of transformers, or one that contains such a model.

    Returns:
        nn.Module: The same model; :func:`mmlite.restore` undoes the change.

    Raises:
        ValueError: The model has no deformable attention, or one that reads the nearest pixel
            (``decoder_method='discrete'``), which is another function.
        ImportError: The installed transformers is too old.
    """
    check_version()
    modules = dict(model.named_modules())
    stock = {name: part for name, part in modules.items() if _fused_class(type(part))}
    ours = (_Fused, InterleavedEncoder)
    if not stock and not any(isinstance(part, ours) for part in modules.values()):
        raise ValueError(
            f'{type(model).__name__} has no deformable attention of transformers to run on '
            'mmlite.ops; models such as Deformable DETR, Grounding DINO, Mask2Former and RT-DETR do'
        )
    if any(_reads_nearest(part) for part in stock.values()):
        raise ValueError(
            f'the deformable attention of {type(model).__name__} reads the nearest pixel and '
            "mmlite.ops interpolates: only models with decoder_method='default' can be served"
        )
    with changing(model, 'fuse') as change:
        for name, part in stock.items():
            change.set_class(model, name, _fused_class(type(part)))
    count = len(stock)
    logging.getLogger('mmlite').info('fuse: %d deformable attentions run on mmlite.ops', count)
    return model


def check_version() -> None:
    """Refuse a transformers that is too old.

    Raises:
        ImportError: transformers is not installed or too old; the message says what to install.
    """
    try:
        from transformers import __version__ as version
    except ImportError as error:
        raise ImportError(
            f"transformers is not installed: pip install 'transformers>={OLDEST}'"
        ) from error
    if Version(version) < OLDEST:
        raise ImportError(
            f'transformers {version} is too old for mmlite, which needs {OLDEST} or later: '
            f"pip install 'transformers>={OLDEST}'"
        )


class _Fused:
    """What the subclasses made by :func:`_fused_class` have in common."""

    stock_class: type[nn.Module]

    def __reduce__(self):
        # The subclass has no name to be found by; it is made again where the pickle is read.
        return _empty, (self.stock_class,), self.__dict__


def _empty(stock: type[nn.Module]) -> nn.Module:
    fused = _fused_class(stock) or stock
    return fused.__new__(fused)


@cache
def _fused_class(stock: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of a module class of transformers that samples with our operator.

    Args:
        stock (type[nn.Module]): Any module class.

    Returns:
        type[nn.Module] | None: None where the class does no sampling of its own.
    """
    if not stock.__module__.startswith('transformers.') or issubclass(stock, _Fused):
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
        changed = {'forward': _with_globals(stock.forward, _SAMPLERS)}
    else:
        return None
    return type(f'Fused{stock.__name__}', (_Fused, stock), {**changed, 'stock_class': stock})


def _with_globals(function: FunctionType, replaced: dict) -> FunctionType:
    """A copy of a function for which some global names mean something else."""
    namespace = {**function.__globals__, **replaced}
    # torch.compile would look the names up in the module of this name.
    del namespace['__name__']
    copy = FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _reads_nearest(module: nn.Module) -> bool:
    method = getattr(module, 'method', getattr(module, 'decoder_method', 'default'))
    return method != 'default'


def _forward_sampler(
    self,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: LevelSizes,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """transformers' ``MultiScaleDeformableAttention``: its shapes are our operator's."""
    return _sample(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _sample(
    value: Tensor,
    value_spatial_shapes: LevelSizes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """transformers' ``multi_scale_deformable_attention``."""
    return ops.ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def _sample_by_level(
    value: Tensor,
    value_spatial_shapes: LevelSizes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = 'default',
) -> Tensor:
    """transformers' ``multi_scale_deformable_attention_v2``: each level has its number of points.

    Args:
        value (Tensor): shape (B, S, M, D).
        value_spatial_shapes (LevelSizes): (h, w) of each level.
        sampling_locations (Tensor): shape (B, Q, M, sum of ``num_points_list``, 2).
        attention_weights (Tensor): shape (B, Q, M, sum of ``num_points_list``).
        num_points_list (list[int]): Points of each level.
        method (str): ``'default'``, which interpolates.

    Returns:
        Tensor: shape (B, Q, M*D).
    """
    points = max(num_points_list)
    if min(num_points_list) < points:
        # The missing points lie outside the map and weigh nothing.
        missing = [points - count for count in num_points_list]
        levels = sampling_locations.split(num_points_list, -2)
        sampling_locations = torch.cat(
            [F.pad(level, (0, 0, 0, more), value=-1.0) for level, more in zip(levels, missing)], -2
        )
        levels = attention_weights.split(num_points_list, -1)
        attention_weights = torch.cat(
            [F.pad(level, (0, more)) for level, more in zip(levels, missing)], -1
        )
    shape = (len(num_points_list), points)
    return ops.ms_deform_attn(
        value,
        value_spatial_shapes,
        sampling_locations.unflatten(-2, shape),
        attention_weights.unflatten(-1, shape),
    )


# The functions of transformers, by name, and ours in their place.
_SAMPLERS = {
    'multi_scale_deformable_attention': _sample,
    'multi_scale_deformable_attention_v2': _sample_by_level,
}
