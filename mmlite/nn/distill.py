"""Distillation: a student encoder learns to give the tokens of its teacher, without labels.

A trained stock encoder is the teacher of the Lite encoder made from it. No annotation is needed:
the teacher's tokens on any images say what the student's should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any


def compared_layers(student: nn.Module) -> list[tuple[int, int]]:
    """After which layers of the student all tokens are compared, and with which of the teacher.

    They are those that update every level, as after them all tokens are equally old; and the last.

    Args:
        student (nn.Module): A Lite encoder.

    Returns:
        list[tuple[int, int]]: Numbers of a layer of the student and of the teacher's layer that
        has updated the high-level tokens as often.
    """
    pairs, updates = [], -1
    for index, step in enumerate(student.steps):
        updates += step.updates_high
        if step.updates_low:
            pairs.append((index, updates))
    return pairs


@contextmanager
def keep_outputs(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Keep what modules return: of each call one tensor, the first where there are more."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        kept.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(keep))
        yield kept


def token_distance(
    found: Sequence[Tensor], wanted: Sequence[Tensor], padding_mask: Tensor | None = None
) -> Tensor:
    """Mean squared distance of tokens, in units of the variance of those that are wanted.

    Args:
        found (Sequence[Tensor]): Tokens after some layers, shape (bs, num_tokens, channels).
        wanted (Sequence[Tensor]): The teacher's, of the same shapes.
        padding_mask (Tensor, optional): bool, True on padding, which does not count, shape
            (bs, num_tokens).

    Returns:
        Tensor: A scalar: 0 where they are equal, 1 where a layer gives the mean alone.
    """
    distances = []
    for ours, theirs in zip(found, wanted):
        if padding_mask is not None:
            ours, theirs = ours[~padding_mask], theirs[~padding_mask]
        # In float32, also under autocast: squares of half precision overflow.
        ours, theirs = ours.float().flatten(0, -2), theirs.float().flatten(0, -2)
        distances.append((ours - theirs).square().mean() / theirs.var(0).mean())
    return torch.stack(distances).mean()
