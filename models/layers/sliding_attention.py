"""Attention that sees a window of the past (Beltagy et al. 2020, arXiv 2004.05150, one-sided)."""

from __future__ import annotations

from madkernels.models.layers.attention import Attention
from madkernels.models.layers.base import StateOption, check_positive


def by_window(window: int, state: int, wanted: int) -> float:
    return (window + 1) * wanted / state - 1


class SlidingAttention(Attention):
    """As :class:`Attention`, with its options, but a query sees itself and the `window` tokens before it."""

    state_grows = False
    state_option = StateOption("window", by_window)

    def __init__(
        self, dim: int, *, heads: int = 16, window: int = 32, kv_heads: int = 0, head_dim: int = 0, bias: bool = True,
        rope_theta: float = 10000.0, rope_factor: float = 1.0, original_length: int = 0, low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__(
            dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, rope_theta=rope_theta,
            rope_factor=rope_factor, original_length=original_length, low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor,
        )  # fmt: skip
        check_positive(window=window)
        self.window = window + 1
