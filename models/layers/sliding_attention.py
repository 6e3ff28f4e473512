"""Attention that sees a window of the past (Beltagy et al. 2020, arXiv 2004.05150, one-sided)."""

from __future__ import annotations

from madkernels.models.layers.attention import Attention
from madkernels.models.layers.base import StateOption, check_positive


def by_window(window: int, state: int, wanted: int) -> float:
    return (window + 1) * wanted / state - 1


class SlidingAttention(Attention):
    """As :class:`Attention`, but a query sees itself and the `window` tokens before it."""

    state_grows = False
    state_option = StateOption("window", by_window)

    def __init__(self, dim: int, *, heads: int = 16, window: int = 32) -> None:
        super().__init__(dim, heads=heads)
        check_positive(window=window)
        self.window = window + 1
