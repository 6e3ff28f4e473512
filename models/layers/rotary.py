"""Rotary positions (Su et al. 2021, arXiv 2104.09864), and how they are stretched for longer sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from madkernels.models.layers.base import check_positive


@dataclass(frozen=True)
class Rope:
    """Frequencies ``theta^(-2 i / head_dim)`` of the pairs (i, i + head_dim / 2), and what they are divided by.

    Attributes:
        theta: see above.
        factor: 1 as trained. All frequencies are divided by it (linear scaling), unless there is an `original_length`.
        original_length: tokens of the sequences before a model was stretched, or 0. With it (as in Llama 3.1) the factor is
            that of slow pairs, with less than `low_freq_factor` turns over so many tokens; fast ones, with more than
            `high_freq_factor`, stay as they are, and between the two the share of each goes linearly with the turns.
    """

    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def check(self) -> None:
        """Raises ValueError for what makes no frequencies."""
        if not (self.theta > 0 and self.factor > 0):
            raise ValueError(f"rope_theta is {self.theta} and rope_factor {self.factor}; expected both above 0")
        if self.original_length:
            check_positive(original_length=self.original_length)
            low, high = self.low_freq_factor, self.high_freq_factor
            if not low < high:
                raise ValueError(f"low_freq_factor is {low} and high_freq_factor {high}; expected low below high")

    def frequencies(self, head_dim: int, like: Tensor) -> Tensor:
        """(head_dim / 2,), on the device of a tensor and in its dtype."""
        exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=like.dtype) / head_dim
        plain = 1.0 / self.theta**exponents
        if not self.original_length:
            return plain / self.factor
        turns = self.original_length / (2 * math.pi / plain)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


def rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """x (batch, seqlen, heads, head_dim) turned to positions (seqlen,) or (batch, seqlen)."""
    half = x.shape[-1] // 2
    wide = positions.to(torch.promote_types(x.dtype, torch.float32))
    angle = wide[..., None, None] * rope.frequencies(x.shape[-1], like=wide)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
