"""Loss over what a model has besides size and data: total state, tokens beyond the optimum, and the share of attention.

P* = k M^c              perplexity at a budget against total state M, state-optimal (Poli et al. 2024, arXiv 2403.17844)
gap = L - L_opt(C)      what a training of D = r D_opt(C) tokens loses to the best use of its FLOPs
L(s), least at s*       loss at a budget against the share s of attention among the sequence mixers
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from madkernels.models.spec import parse
from madkernels.scaling.fits.isoflop import Best, PowerLaw, about_parabola, line, minima
from madkernels.scaling.fits.statistics import Array, Interval, interval


@dataclass(frozen=True)
class StateLaw:
    """P = exp(offset) M^exponent; the interval is of the exponent."""

    law: PowerLaw
    interval: Interval | None
    count: int


def state_law(state: Array, loss: Array, resamples: int = 1000, seed: int = 42) -> StateLaw:
    """state (n,) in elements, loss (n,) in nats at one budget. Points are resampled. ValueError for one state only."""
    x = np.log(state)
    if len(np.unique(x)) < 2:
        raise ValueError("all runs have one size of state: no law can be told from them")
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(x), size=(resamples, len(x)))
    slopes = np.array([line(x[rows], loss[rows]).exponent for rows in chosen if len(np.unique(x[rows])) > 1])
    return StateLaw(line(x, loss), interval(slopes) if len(slopes) > 1 and len(x) > 2 else None, len(x))


@dataclass(frozen=True)
class Overtrained:
    """A run of `ratio` times the optimal tokens of its FLOPs: its loss, the optimal loss, and the gap in nats.

    beyond: the FLOPs are outside of the budgets that the optimum is known from.
    """

    params: float
    tokens: float
    flops: float
    ratio: float
    loss: float
    optimal: float
    beyond: bool

    @property
    def gap(self) -> float:
        return self.loss - self.optimal


def overtrained(params: Array, tokens: Array, flops: Array, loss: Array, best: list[Best]) -> list[Overtrained]:
    """Each (n,), against the best sizes at two budgets at least: straight lines between them in logarithms, and beyond."""
    inside = [b for b in best if not b.edge]
    if len(inside) < 2:
        raise ValueError("the optimum is known at fewer than two budgets: no gap can be told")
    compute = np.array([b.flops for b in inside])
    data = _between(compute, np.array([b.tokens for b in inside]), flops)
    least = _between(compute, np.array([b.loss for b in inside]), flops)
    beyond = (flops < compute.min()) | (flops > compute.max())
    columns = (params, tokens, flops, tokens / data, loss, least, beyond)
    return sorted((Overtrained(*row) for row in zip(*(c.tolist() for c in columns), strict=True)), key=lambda row: row.ratio)


def _between(x: Array, y: Array, at: Array) -> Array:
    """Through (k,) points in order of x, at (n,); the first and the last piece go on beyond."""
    known, wanted = np.log(x), np.log(at)
    piece = np.clip(np.searchsorted(known, wanted) - 1, 0, len(known) - 2)
    slopes = np.diff(np.log(y)) / np.diff(known)
    found: Array = np.exp(np.log(y)[piece] + slopes[piece] * (wanted - known[piece]))
    return found


@dataclass(frozen=True)
class HybridRatio:
    """The share of attention at which the loss is least, its interval, and how many draws have their minimum inside."""

    share: float
    loss: float
    interval: Interval | None
    inside: float


def attention_share(arch: str) -> float:
    """Attention layers, full and sliding, as a part of the sequence mixers."""
    mixers = [spec.layer for spec in parse(arch).layers if spec.layer.mixes != "channel"]
    return sum(layer.is_attention for layer in mixers) / max(len(mixers), 1)


def hybrid_ratio(shares: Array, loss: Array, resamples: int = 1000, seed: int = 42) -> HybridRatio:
    """shares, loss: (n,) at one budget. A parabola; residuals are resampled.

    ValueError for fewer than three shares, or where the least loss is at the first or the last of them.
    """
    if len(np.unique(shares)) < 3:
        raise ValueError(f"{len(np.unique(shares))} shares of attention; a minimum takes 3")
    order = np.argsort(shares, kind="stable")
    x, y = shares[order], loss[order]
    at, value = minima(x, y[:, None], "parabola")
    if not np.isfinite(at[0]):
        raise ValueError("the least loss is at an edge of the shares of attention")
    smooth, noise = about_parabola(x, y)
    drawn, _ = minima(x, smooth[:, None] + np.random.default_rng(seed).choice(noise, (len(y), resamples)), "parabola")
    usable = drawn[np.isfinite(drawn)]
    span = interval(usable) if len(y) > 3 and len(usable) > 1 else None  # three points leave no residual
    return HybridRatio(float(at[0]), float(value[0]), span, len(usable) / max(resamples, 1))
