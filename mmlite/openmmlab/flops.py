"""What our operators cost, for MMDetection's ``get_flops`` and for :mod:`mmlite.analysis`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape


def deform_attn_flops(
    queries: int, heads: int, points: int, head_dim: int, *, key_aware: bool
) -> int:
    """Cost of sampling and attending, without the linear layers around it.

    A bilinear sample costs 4 a channel. Key-aware attention samples a key and a value at each
    point and adds two products, ``q k`` and ``weights v``. Sampling is counted for both even
    where the key is the value and a kernel samples once. Standard attention weights its
    samples elementwise, which the rule does not count.

    Args:
        queries (int): Number of queries, summed over the batch.
        heads (int): Number of heads, M.
        points (int): Points of one head of one query over all levels, L*P.
        head_dim (int): Channels of a head, D.
        key_aware (bool): Key-aware or standard deformable attention.
    """
    channels = queries * heads * points * head_dim
    return (4 + 4 + 1 + 1) * channels if key_aware else 4 * channels


def _deform_attn(shape_of: Callable, value: int, sampling: int, levels: tuple, *, key_aware: bool):
    """The rule of an operator of ours, whose arguments ``shape_of`` gives the shape of.

    ``value`` and ``sampling`` (locations or offsets) say which arguments these are, and ``levels``
    which one tells the number of levels, and in which dimension.
    """

    def rule(args: Sequence, out: object) -> int:
        batch, queries, heads, _, points, _ = shape_of(args[sampling])
        argument, axis = levels
        num_points = shape_of(args[argument])[axis] * points
        head_dim = shape_of(args[value])[-1]
        return deform_attn_flops(batch * queries, heads, num_points, head_dim, key_aware=key_aware)

    return rule


def operator_rules(shape_of: Callable) -> dict[str, Callable]:
    """The rule of each operator: FLOPs from its arguments, whose shapes ``shape_of`` tells."""
    key_aware = partial(_deform_attn, shape_of, 2, key_aware=True)
    standard = partial(_deform_attn, shape_of, 0, key_aware=False)
    return {
        'key_aware_deform_attn': key_aware(4, (4, 3)),
        'key_aware_deform_attn_from_offsets': key_aware(5, (4, 2)),
        'ms_deform_attn': standard(2, (2, 3)),
        'ms_deform_attn_from_offsets': standard(3, (2, 2)),
    }


# mmengine's ``get_model_complexity_info``, which counts for mmdet's ``get_flops``, skips operators
# that it does not know. There is no public way to tell it.
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(
    {f'mmlite::{name}': rule for name, rule in operator_rules(get_shape).items()}
)
