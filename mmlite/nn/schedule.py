"""When the encoder updates which feature levels."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_PATTERN = re.compile(r'H(\d+)L(\d+)-\((\d+)\+1\)x(\d+)', re.IGNORECASE)
UPDATES = ('joint', 'sequential')


class EncoderStep(NamedTuple):
    """One encoder layer: which tokens are its queries. Keys and values are always all tokens.

    Attributes:
        updates_high (bool): The high-level tokens are updated.
        updates_low (bool): The low-level tokens are updated.
    """

    updates_high: bool
    updates_low: bool

    def ffns(self, small_ffn: bool) -> tuple[bool, bool]:
        """Whether its layer needs the usual FFN, and whether it needs a small one."""
        has_small = small_ffn and self.updates_low
        return self.updates_high or not has_small, has_small


@dataclass(frozen=True)
class EncoderSchedule:
    """The interleaved update schedule ``HxLy-(A+1)xB`` (Lite DETR, section 4.1).

    x high-level maps (the smallest), y low-level maps (the largest), B blocks, and in each block
    A updates of the high-level tokens and one of the low-level tokens.

    Attributes:
        num_high_levels (int): x.
        num_low_levels (int): y.
        high_updates (int): A.
        num_blocks (int): B.
    """

    num_high_levels: int
    num_low_levels: int
    high_updates: int
    num_blocks: int

    def __post_init__(self) -> None:
        if min(self.num_high_levels, self.num_low_levels, self.high_updates, self.num_blocks) < 1:
            raise ValueError(
                f'schedule {self} needs at least one high-level map, one low-level map, one '
                'high-level update and one block'
            )

    @classmethod
    def parse(cls, text: str | EncoderSchedule) -> EncoderSchedule:
        """Read a schedule such as ``'H3L1-(2+1)x3'``; ``str()`` gives the canonical name back.

        Raises:
            ValueError: The text is no schedule.
        """
        if isinstance(text, cls):
            return text
        match = _PATTERN.fullmatch(re.sub(r'\s', '', text)) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f'schedule {text!r} is not of the form HxLy-(A+1)xB, for example H3L1-(2+1)x3: '
                '3 high-level and 1 low-level maps, 3 blocks of 2 high-level updates and '
                '1 low-level update'
            )
        return cls(*map(int, match.groups()))

    @property
    def num_levels(self) -> int:
        """Number of feature levels, x + y."""
        return self.num_high_levels + self.num_low_levels

    @property
    def num_layers(self) -> int:
        """Updates of the high-level tokens, A * B: the layers of the stock encoder it replaces."""
        return self.high_updates * self.num_blocks

    def steps(self, update: str = 'joint') -> tuple[EncoderStep, ...]:
        """The encoder layers in order.

        Args:
            update (str): ``'joint'``: a block has A layers and the last of them updates all
                tokens together, as in the published weights. ``'sequential'``: the low-level
                tokens are updated in a layer of their own after the A high-level updates, as in
                the paper's figure 3; a block has A + 1 layers.

        Returns:
            tuple[EncoderStep, ...]: A*B steps, or (A+1)*B for sequential update.

        Raises:
            ValueError: ``update`` is neither of the two.
        """
        high_only = EncoderStep(updates_high=True, updates_low=False)
        if update == 'joint':
            last = EncoderStep(updates_high=True, updates_low=True)
            block = (high_only,) * (self.high_updates - 1) + (last,)
        elif update == 'sequential':
            last = EncoderStep(updates_high=False, updates_low=True)
            block = (high_only,) * self.high_updates + (last,)
        else:
            raise ValueError(f'update must be one of {", ".join(UPDATES)}; got {update!r}')
        return block * self.num_blocks

    def low_levels(self, level_sizes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Which levels are the low-level maps: the y largest.

        Args:
            level_sizes (Sequence[tuple[int, int]]): (h, w) of every level, in any order.

        Returns:
            tuple[int, ...]: Their indices, ascending.
        """
        areas = [height * width for height, width in level_sizes]
        # By counting: traced sizes can be compared, but not sorted.
        ranks = [
            sum(other >= area if i < level else other > area for i, other in enumerate(areas))
            for level, area in enumerate(areas)
        ]
        return tuple(level for level, rank in enumerate(ranks) if rank < self.num_low_levels)

    def check_low_levels(self, low_levels: Collection[int]) -> None:
        """Check a choice of low-level maps.

        Raises:
            ValueError: They are not as many different levels as the schedule says.
        """
        if len(set(low_levels)) != self.num_low_levels or not all(
            0 <= level < self.num_levels for level in low_levels
        ):
            raise ValueError(
                f'schedule {self} has {self.num_low_levels} low-level of {self.num_levels} maps; '
                f'low_levels={list(low_levels)} must name as many, counted from 0'
            )

    def check_fit(self, num_layers: int | None, num_levels: int, update: str = 'joint') -> None:
        """Check that the schedule fits the encoder it is put into.

        Args:
            num_layers (int, optional): Layers of the stock encoder that is replaced.
            num_levels (int): Feature levels of its attention.
            update (str): See :meth:`steps`.

        Raises:
            ValueError: It does not; the message says what would fit.
        """
        levels = f'H{self.num_high_levels}L{self.num_low_levels}'
        if num_layers is not None and num_layers not in (self.num_layers, len(self.steps(update))):
            fitting = ', '.join(
                f'{levels}-({num_layers // blocks}+1)x{blocks}'
                for blocks in range(num_layers, 0, -1)
                if num_layers % blocks == 0
            )
            raise ValueError(
                f'schedule {self} makes {self.num_layers} layers, but num_layers is '
                f'{num_layers}; use one of {fitting}, or num_layers={self.num_layers}'
            )
        if self.num_levels != num_levels:
            blocks = f'({self.high_updates}+1)x{self.num_blocks}'
            fitting = ', '.join(
                f'H{num_levels - low}L{low}-{blocks}' for low in range(1, min(num_levels, 3))
            )
            raise ValueError(
                f'schedule {self} is for {self.num_levels} feature levels, but the '
                f"encoder's attention has num_levels={num_levels}; use {fitting or 'more levels'}"
            )

    def encode(self, update: str = 'joint') -> Tensor:
        """For a checkpoint: int64 (x, y, A, B, index of ``update`` in ``UPDATES``)."""
        return torch.tensor([*astuple(self), UPDATES.index(update)])

    @classmethod
    def decode(cls, code: Tensor) -> tuple[EncoderSchedule, str]:
        """The schedule and the update that :meth:`encode` made the numbers of.

        They may have been cast to another dtype or averaged, as people do to whole checkpoints.
        """
        *numbers, update = code.double().round().long().tolist()
        return cls(*numbers), UPDATES[update]

    def __str__(self) -> str:
        return (
            f'H{self.num_high_levels}L{self.num_low_levels}'
            f'-({self.high_updates}+1)x{self.num_blocks}'
        )
