"""What our operators cost, for MMDetection's ``get_flops`` and for :mod:`mmlite.analysis`.

Importing this adds the rule of our operator to a table of mmengine: ``get_flops`` counts by it,
and skips operators that are not there. The table is private; the analyser is made inside, so there
is no public way to it. What mmengine counts of other operators stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape


def deform_attn_flops(
    queries: int, heads: int, points: int, head_dim: int, *, key_aware: bool
) -> int:
    """Cost of sampling and attending, of ``queries`` of the batch with ``points`` over all levels.

    A bilinear sample costs 4 a channel. Key-aware attention samples a key and a value at each
    point and adds two products, ``q k`` and ``weights v``. Sampling is counted for both even
    where the key is the value and a kernel samples once. Standard attention weights its
    samples elementwise, which the rule does not count.
    """
    channels = queries * heads * points * head_dim
    return (4 + 4 + 1 + 1) * channels if key_aware else 4 * channels


def operator_rules(shape_of: Callable) -> dict[str, Callable]:
    """The rule of our operator: FLOPs from its arguments, whose shapes ``shape_of`` tells."""

    def deform_attn(args: Sequence, out: object) -> int:
        query, value, reference_points, sampling = (
            None if args[i] is None else shape_of(args[i]) for i in (0, 2, 4, 5)
        )
        batch, queries, heads, levels, points, _ = sampling
        if reference_points is not None:  # one set of offsets may serve all levels
            levels = reference_points[2]
        return deform_attn_flops(
            batch * queries, heads, levels * points, value[-1], key_aware=query is not None
        )

    return {'deform_attn': deform_attn}


for _name, _rule in operator_rules(get_shape).items():
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(f'mmlite::{_name}', _rule)
