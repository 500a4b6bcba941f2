"""Which tokens of a feature pyramid an encoder step updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import EncoderStep


class TokenRun(NamedTuple):
    """Neighbouring tokens that a step treats alike.

    Attributes:
        start (int): The first of them, in the order of the pyramid.
        stop (int): The one behind the last.
        is_low (bool): They belong to low-level maps.
        is_updated (bool): The step updates them: they are its queries.
    """

    start: int
    stop: int
    is_low: bool
    is_updated: bool


class StepTokens:
    """The tokens of one encoder step: picks the queries out, and puts them back.

    Levels may come in any order; neighbouring levels of a kind form one run, so that picking a
    run is a view of the memory.

    Args:
        step (EncoderStep): What is updated.
        level_sizes (Sequence[tuple[int, int]]): (h, w) of every level, in the order of the tokens.
        ranks (Sequence[int]): Of every level, how many are smaller; see
            :func:`mmlite.nn.schedule.level_ranks`.
        num_high_levels (int): So many of the smallest are the high-level maps.

    Attributes:
        read (tuple[int, ...], optional): Indices of the levels that the step reads; None: all.
    """

    def __init__(
        self,
        step: EncoderStep,
        level_sizes: Sequence[tuple[int, int]],
        ranks: Sequence[int],
        num_high_levels: int,
    ) -> None:
        runs: list[TokenRun] = []
        self.starts = [0]
        for rank, (height, width) in zip(ranks, level_sizes):
            is_low = rank >= num_high_levels
            kind = (is_low, step.updates(rank, is_low))
            start, stop = self.starts[-1], self.starts[-1] + height * width
            if runs and runs[-1][2:] == kind:
                runs[-1] = runs[-1]._replace(stop=stop)
            else:
                runs.append(TokenRun(start, stop, *kind))
            self.starts.append(stop)
        self.runs = tuple(runs)
        self.queries = tuple(run for run in runs if run.is_updated)
        self.read: tuple[int, ...] | None = None
        if step.reads is not None:
            self.read = tuple(i for i, rank in enumerate(ranks) if rank in step.reads)

    def keys(self, tokens: Tensor) -> Tensor:
        """The tokens that the step reads, shape (bs, num_keys, ...)."""
        if self.read is None:
            return tokens
        pieces = [(self.starts[level], self.starts[level + 1]) for level in self.read]
        return _cat([tokens[:, start:stop] for start, stop in pieces])

    def pick(self, tokens: Tensor) -> Tensor:
        """The queries of the step.

        Args:
            tokens (Tensor): All tokens, shape (bs, num_tokens, ...).

        Returns:
            Tensor: shape (bs, num_queries, ...), a view where they lie together.
        """
        if len(self.queries) == len(self.runs):
            return tokens
        return _cat([_cut(tokens, run) for run in self.queries])

    def split(self, queries: Tensor) -> list[tuple[TokenRun, Tensor]]:
        """Queries run by run, views of what :meth:`pick` returned or of something of its shape."""
        sizes = [run.stop - run.start for run in self.queries]
        return list(zip(self.queries, queries.split(sizes, 1)))

    def low(self, queries: Tensor) -> Tensor:
        """The low-level tokens among the queries, shape (bs, num_low_queries, ...)."""
        return _cat([tokens for run, tokens in self.split(queries) if run.is_low])

    def put_back(self, tokens: Tensor, updated: Sequence[Tensor]) -> Tensor:
        """All tokens with the queries replaced.

        Args:
            tokens (Tensor): All tokens, shape (bs, num_tokens, ...).
            updated (Sequence[Tensor]): The new queries, run by run as :meth:`split` gives them.

        Returns:
            Tensor: A new tensor of the shape of ``tokens``.
        """
        fresh = iter(updated)
        return _cat([next(fresh) if run.is_updated else _cut(tokens, run) for run in self.runs])


def _cut(tokens: Tensor, run: TokenRun) -> Tensor:
    return tokens.narrow(1, run.start, run.stop - run.start)


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
