"""Fused CPU kernels."""

from __future__ import annotations

from torch import Tensor


def status() -> tuple[bool, str]:
    """Whether the kernels run here, and what runs or why not."""
    return False, 'the CPU kernels are not built'


def serves(value: Tensor) -> bool:
    """Whether this backend takes a call with such a ``value``."""
    return False
