"""Intervals between percentiles of draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Ends of an interval, and the standard deviation where there are draws."""

    low: float
    high: float
    sd: float | None = None


def interval(draws: Array, level: float = 0.95) -> Interval:
    """The interval between percentiles of draws, with their standard deviation (population form)."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a parameter that is not determined
        low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
        return Interval(float(low), float(high), float(draws.std()))
