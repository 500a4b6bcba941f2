"""What models are measured on: shared by the benchmarks of encoders and of detectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .latency import Call, Name, Timing, measure, measurements
from .report import Start


@dataclass(frozen=True)
class Setting:
    """What is run, where, and how often."""

    image_size: tuple[int, int] = (800, 1333)  # height and width in pixels
    batch_sizes: tuple[int, ...] = (1,)
    dtype: str = 'float32'  # or what autocast runs in
    device: str = 'cpu'
    rounds: int = 10  # measurements of each contestant; 0 to count only
    warmup: int = 2  # calls before
    training: bool = False  # also measure a training step, at the first batch size

    @property
    def batch_size(self) -> int:
        """The first of them."""
        return self.batch_sizes[0]

    def autocast(self) -> torch.autocast:
        """What to run a model in."""
        return torch.autocast(
            torch.device(self.device).type,
            dtype=getattr(torch, self.dtype),
            enabled=self.dtype != 'float32',
        )

    def measure(
        self, contestants: Mapping[Name, Call], start: Start, text: str
    ) -> dict[Name, Timing]:
        """:func:`~mmlite.analysis.latency.measure`, ``text`` beside its progress bar."""
        return measure(
            contestants,
            rounds=self.rounds,
            warmup=self.warmup,
            device=self.device,
            on_step=start(text, measurements(len(contestants), self.rounds)),
        )
