"""Which feature levels every layer of the encoder updates and reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

_LITE = re.compile(r'H(\d+)L(\d+)-\((\d+)\+1\)x(\d+)', re.IGNORECASE)
_LAYERS = re.compile(r'H(\d+)L(\d+)-(.+)', re.IGNORECASE)
_TERM = re.compile(r'([1-9]+)(?::([1-9]+))?(?:x([1-9]\d*))?', re.IGNORECASE)
UPDATES = ('joint', 'sequential')


class EncoderStep(NamedTuple):
    """One encoder layer: which tokens are its queries, and which its keys and values.

    Attributes:
        updates_high (bool): High-level tokens are updated.
        updates_low (bool): Low-level tokens are updated.
        levels (tuple[int, ...], optional): The maps that are updated, 0 the smallest. None: all
            high-level ones, all low-level ones or both, as the two above say.
        reads (tuple[int, ...], optional): The maps that give keys and values; None: all.
    """

    updates_high: bool
    updates_low: bool
    levels: tuple[int, ...] | None = None
    reads: tuple[int, ...] | None = None

    def updates(self, rank: int, is_low: bool) -> bool:
        """Whether a map is updated: the one with so many smaller ones."""
        if self.levels is not None:
            return rank in self.levels
        return self.updates_low if is_low else self.updates_high

    def ffns(self, small_ffn: bool) -> tuple[bool, bool]:
        """Whether its layer needs the usual FFN, and whether it needs a small one."""
        has_small = small_ffn and self.updates_low
        return self.updates_high or not has_small, has_small


@dataclass(frozen=True)
class EncoderSchedule:
    """Which maps every layer updates and reads: ``HxLy-(A+1)xB`` (Lite DETR, section 4.1).

    x high-level maps (the smallest), y low-level maps (the largest), B blocks, and in each block
    A updates of the high-level tokens and one of the low-level tokens, reading all maps.

    Any other schedule names its layers: ``HxLy-`` and, joined by ``+``, for each layer the maps
    that it updates, 1 the smallest, behind a colon those that it reads (left out: all), and
    behind an x how many layers are so. Low-level tokens go through the small FFN where there is
    one; y may be 0. ``H3L0-1:1x3+12:12x3+123x3`` is that of PRO-SCALE (arXiv 2404.14657).

    Attributes:
        num_high_levels (int): x.
        num_low_levels (int): y.
        high_updates (int): A; 0 where the layers are named.
        num_blocks (int): B; 0 where the layers are named.
        layers (tuple[EncoderStep, ...]): The layers where they are named.
    """

    num_high_levels: int
    num_low_levels: int
    high_updates: int
    num_blocks: int
    layers: tuple[EncoderStep, ...] = ()

    def __post_init__(self) -> None:
        if self.layers:
            self._check_layers()
        elif min(self.num_high_levels, self.num_low_levels, self.high_updates, self.num_blocks) < 1:
            raise ValueError(
                f'schedule {self} needs at least one high-level map, one low-level map, one '
                'high-level update and one block'
            )

    def _check_layers(self) -> None:
        maps = range(self.num_levels)
        for number, step in enumerate(self.layers, 1):
            for levels in (step.levels, maps if step.reads is None else step.reads):
                if not levels or len(set(levels)) < len(levels) or not set(levels) <= set(maps):
                    raise ValueError(
                        f'layer {number} of schedule {self} must update and read some of the '
                        f'{self.num_levels} maps, each named once, 1 the smallest'
                    )
        if set(maps) - {level for step in self.layers for level in step.levels or ()}:
            raise ValueError(f'schedule {self} must update each of its {self.num_levels} maps')

    @classmethod
    def parse(cls, text: str | EncoderSchedule) -> EncoderSchedule:
        """Read a schedule such as ``'H3L1-(2+1)x3'``; ``str()`` gives the canonical name back.

        Raises:
            ValueError: The text is no schedule.
        """
        if isinstance(text, cls):
            return text
        compact = re.sub(r'\s', '', text) if isinstance(text, str) else ''
        if match := _LITE.fullmatch(compact):
            high, low, updates, blocks = map(int, match.groups())
            return cls(high, low, updates, blocks)
        match = _LAYERS.fullmatch(compact)
        terms = [_TERM.fullmatch(term) for term in match[3].split('+')] if match else []
        if match is None or not all(terms):
            raise ValueError(
                f'schedule {text!r} is not of the form HxLy-(A+1)xB, for example H3L1-(2+1)x3: '
                '3 high-level and 1 low-level maps, 3 blocks of 2 high-level updates and '
                '1 low-level update; nor does it name its layers, for example H3L0-1:1x3+123x3'
            )
        high, low = int(match[1]), int(match[2])
        layers: list[EncoderStep] = []
        for term in filter(None, terms):
            named, read = ([int(digit) - 1 for digit in term[i] or ''] for i in (1, 2))
            layers += [_step(named, read, high, high + low)] * int(term[3] or 1)
        return cls._of_layers(high, low, tuple(layers))

    @classmethod
    def parse_all(cls, several: str | Iterable[str | EncoderSchedule]) -> list[EncoderSchedule]:
        """:meth:`parse` of each, or of the one that it is."""
        several = [several] if isinstance(several, (str, cls)) else several
        return [cls.parse(each) for each in several]

    @classmethod
    def _of_layers(cls, high: int, low: int, layers: tuple[EncoderStep, ...]) -> EncoderSchedule:
        """The schedule of these layers, of the paper's form where it has one."""
        general = cls(high, low, 0, 0, layers)
        everything = EncoderStep(True, True, tuple(range(high + low)))
        only_high = EncoderStep(True, False, tuple(range(high)))
        for blocks in range(1, len(layers) + 1 if high and low else 0):
            updates, rest = divmod(len(layers), blocks)
            if not rest and layers == ((only_high,) * (updates - 1) + (everything,)) * blocks:
                return cls(high, low, updates, blocks)
        return general

    @classmethod
    def fitting(cls, num_levels: int, num_layers: int) -> list[EncoderSchedule]:
        """Those of the paper's form for so many maps and layers, with few low-level maps first."""
        return [
            cls(num_levels - low, low, updates, num_layers // updates)
            for low in range(1, num_levels)
            for updates in range(1, num_layers + 1)
            if num_layers % updates == 0
        ]

    @property
    def num_levels(self) -> int:
        """Number of feature levels, x + y."""
        return self.num_high_levels + self.num_low_levels

    @property
    def num_layers(self) -> int:
        """Layers of the stock encoder that it replaces: A * B, or as many as are named."""
        return len(self.layers) or self.high_updates * self.num_blocks

    def steps(self, update: str = 'joint') -> tuple[EncoderStep, ...]:
        """The encoder layers in order.

        Args:
            update (str): ``'joint'``: a block has A layers and the last of them updates all
                tokens together, as in the published weights. ``'sequential'``: the low-level
                tokens are updated in a layer of their own after the A high-level updates, as in
                the paper's figure 3; a block has A + 1 layers. Named layers are as they are.

        Returns:
            tuple[EncoderStep, ...]: A*B steps, or (A+1)*B for sequential update.

        Raises:
            ValueError: ``update`` is neither of the two.
        """
        high_only = EncoderStep(updates_high=True, updates_low=False)
        if update not in UPDATES:
            raise ValueError(f'update must be one of {", ".join(UPDATES)}; got {update!r}')
        if self.layers:
            return self.layers
        if update == 'joint':
            last = EncoderStep(updates_high=True, updates_low=True)
            return ((high_only,) * (self.high_updates - 1) + (last,)) * self.num_blocks
        last = EncoderStep(updates_high=False, updates_low=True)
        return ((high_only,) * self.high_updates + (last,)) * self.num_blocks

    def chosen_ranks(self, low_levels: Collection[int]) -> tuple[int, ...]:
        """What :func:`level_ranks` gives where these are the low-level maps, whatever their sizes.

        Raises:
            ValueError: They are not as many different levels as the schedule says, or it names its
                layers, and with them sizes.
        """
        high = [level for level in range(self.num_levels) if level not in low_levels]
        numbers = len(high), len({*low_levels})
        if self.layers or numbers != (self.num_high_levels, self.num_low_levels):
            raise ValueError(
                f'schedule {self} has {self.num_low_levels} low-level of {self.num_levels} maps; '
                f'low_levels={list(low_levels)} must name as many, counted from 0, and no layers'
            )
        order = [*high, *low_levels]
        return tuple(map(order.index, range(self.num_levels)))

    def check_fit(self, num_layers: int | None, num_levels: int, update: str = 'joint') -> None:
        """Check that the schedule fits the encoder it is put into.

        Args:
            num_layers (int, optional): Layers of the stock encoder that is replaced.
            num_levels (int): Feature levels of its attention.
            update (str): See :meth:`steps`.

        Raises:
            ValueError: It does not; the message says what would fit.
        """
        if num_layers is not None and num_layers not in (self.num_layers, len(self.steps(update))):
            all_fitting = [] if self.layers else self.fitting(self.num_levels, num_layers)
            same = (str(s) for s in all_fitting if s.num_low_levels == self.num_low_levels)
            how = 'name as many' if self.layers else f'use one of {", ".join(same)}'
            raise ValueError(
                f'schedule {self} makes {self.num_layers} layers, but num_layers is '
                f'{num_layers}; {how}, or num_layers={self.num_layers}'
            )
        if self.num_levels != num_levels:
            all_fitting = self.fitting(num_levels, self.high_updates * self.num_blocks)
            same = (str(s) for s in all_fitting if s.num_blocks == self.num_blocks)
            fitting = ', '.join([*same][:2])  # one low-level map, or two
            raise ValueError(
                f'schedule {self} is for {self.num_levels} feature levels, but the '
                f"encoder's attention has num_levels={num_levels}; use "
                f'{fitting or "one for as many"}'
            )

    def encode(self, update: str = 'joint') -> Tensor:
        """For a checkpoint: float32 (x, y, A, B, index of ``update`` in ``UPDATES``).

        For named layers A and B are 0, and behind these numbers stand two of each layer, for the
        maps that it updates and reads: the sum of 2 to the power of their numbers from 0.
        """
        return encode_schedules([self], update)

    def _numbers(self, update: str) -> list[int]:
        numbers = [self.num_high_levels, self.num_low_levels, self.high_updates, self.num_blocks]
        numbers.append(UPDATES.index(update))
        for step in self.layers:
            reads = range(self.num_levels) if step.reads is None else step.reads
            numbers += [sum(1 << n for n in levels) for levels in (step.levels or (), reads)]
        return numbers

    @property
    def cost(self) -> int:
        """Tokens that all layers update, of a pyramid whose smallest map has one."""
        ranks = [(rank, rank >= self.num_high_levels) for rank in range(self.num_levels)]
        return sum(4 ** rank[0] for step in self.steps() for rank in ranks if step.updates(*rank))

    @classmethod
    def decode(cls, code: Tensor) -> tuple[EncoderSchedule, str]:
        """The schedule and the update that :meth:`encode` made the numbers of.

        They may have been cast to another dtype or averaged, as people do to whole checkpoints.

        Raises:
            ValueError: The numbers are those of no schedule, or of several.
        """
        numbers = code.double().round().long().tolist()
        try:
            high, low, updates, blocks, update, *layers = numbers
            named = []
            for pair in zip(layers[::2], layers[1::2]):
                levels, reads = ([n for n in range(b.bit_length()) if b >> n & 1] for b in pair)
                named.append(_step(levels, reads, high, high + low))
            if layers:
                updates = blocks = 0
            found = cls(high, low, updates, blocks, tuple(named)), UPDATES[update]
            if found[0]._numbers(found[1]) == numbers:
                return found
        except (IndexError, ValueError):
            pass
        raise ValueError(f'{numbers} is the code of no schedule; see EncoderSchedule.encode')

    def __str__(self) -> str:
        name = f'H{self.num_high_levels}L{self.num_low_levels}-'
        if not self.layers:
            return f'{name}({self.high_updates}+1)x{self.num_blocks}'
        terms = []
        for step, same in groupby(self.layers):
            reads = '' if step.reads is None else ':' + _digits(step.reads)
            times = len(list(same))
            terms.append(_digits(step.levels or ()) + reads + (f'x{times}' if times > 1 else ''))
        return name + '+'.join(terms)


def encode_schedules(schedules: Sequence[EncoderSchedule], update: str) -> Tensor:
    """The codes of several schedules one after the other, -1 between them.

    As floats, which averages of whole checkpoints do not cut off.
    """
    codes = [schedule._numbers(update) for schedule in schedules]
    return torch.tensor([float(number) for code in codes for number in (-1, *code)][1:])


def decode_schedules(code: Tensor) -> tuple[list[EncoderSchedule], str]:
    """What :func:`encode_schedules` made the numbers of."""
    numbers = code.double().round().long()
    ends = [*(numbers == -1).nonzero().flatten().tolist(), len(numbers)]
    starts = [0, *(end + 1 for end in ends)]
    found = [EncoderSchedule.decode(numbers[start:end]) for start, end in zip(starts, ends)]
    return [schedule for schedule, _ in found], found[0][1]


def layer_steps(
    schedules: Sequence[EncoderSchedule], update: str = 'joint'
) -> tuple[EncoderStep, ...]:
    """What the layers must be able to do that serve several schedules, one layer after the other.

    Args:
        schedules (Sequence[EncoderSchedule]): One or more.
        update (str): See :meth:`EncoderSchedule.steps`.

    Returns:
        tuple[EncoderStep, ...]: Of every layer whether high- and low-level tokens are updated in
        any of the schedules.

    Raises:
        ValueError: The schedules have other numbers of levels or layers, or update the high-level
            tokens in other layers.
    """
    all_steps = [schedule.steps(update) for schedule in schedules]
    first, kinds = schedules[0], [[step.updates_high for step in steps] for steps in all_steps]
    for schedule, kind in zip(schedules, kinds):
        if schedule.num_levels != first.num_levels or kind != kinds[0]:
            raise ValueError(
                f'one set of weights cannot serve {first} and {schedule}: they must have as many '
                'maps and layers, and update high-level maps in the same layers'
            )
    return tuple(
        EncoderStep(any(s.updates_high for s in steps), any(s.updates_low for s in steps))
        for steps in zip(*all_steps)
    )


def stock_layers(steps: Iterable[EncoderStep]) -> list[int]:
    """For each Lite layer the stock layer that has updated the high-level tokens as often."""
    updates = accumulate(step.updates_high for step in steps)
    return [max(number - 1, 0) for number in updates]


def level_ranks(level_sizes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Of every level, how many are smaller; of equal ones the later count as smaller.

    By counting: traced sizes can be compared, but not sorted.
    """
    areas = [height * width for height, width in level_sizes]
    return tuple(
        sum(other <= area if i > level else other < area for i, other in enumerate(areas))
        for level, area in enumerate(areas)
    )


def _step(updates: list[int], reads: list[int], high: int, total: int) -> EncoderStep:
    """A named layer; reading no maps, or all, is None."""
    reads_all = not reads or sorted(reads) == list(range(total))
    return EncoderStep(
        any(level < high for level in updates),
        any(level >= high for level in updates),
        tuple(sorted(updates)),
        None if reads_all else tuple(sorted(reads)),
    )


def _digits(levels: Iterable[int]) -> str:
    return ''.join(str(level + 1) for level in levels)
