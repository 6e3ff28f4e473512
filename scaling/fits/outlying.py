"""Losses that no run of that size and data comes to, found before anything is fitted: most are of diverged runs.

Of end points: a surface E + A / N^alpha + B / D^beta with moderate exponents is laid through all runs, by least squares with
weights that fall with the residuals. It cannot bend towards one run, as a curve through five sizes does. A run is outlying
beyond five robust standard deviations, and by a tenth at least; by a half below one token per parameter, where losses are
high without anything being wrong. A surface can follow one of very few runs; there a gap tells: a loss half as high again as
the next lower one, above the median.

Of training curves: the loss of a size is higher by as much than it was before, or falls and comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import median_filter

from madkernels.scaling.fits.form import Points, Problem
from madkernels.scaling.fits.isoflop import training_curves
from madkernels.scaling.fits.runs_table import TOLD, Selection, by_row
from madkernels.scaling.fits.screening import OUTLYING, UNDERTRAINED, Flags
from madkernels.scaling.fits.statistics import Array
from madkernels.scaling.fits.surface import SAMPLE, projected, sample

FAR, FAR_UNDERTRAINED = np.log(1.1), np.log(1.5)  # of the loss
GAP = np.log(1.5)
FEWEST = 4  # runs; fewer tell nothing of one another
EXPONENTS = np.geomspace(0.05, 0.7, 12)  # a steeper surface explains a diverged run by its being the smallest
ROUNDS = 20
WIDE = 5  # places of a training curve that are looked at around one


@dataclass(frozen=True)
class Outlying:
    """Flags of points (n,), and the loss that was to be expected there."""

    flags: Flags
    expected: Array


def tell(selection: Selection, found: Outlying) -> Selection:
    """The selection with a warning for each outlying row."""
    rows = np.flatnonzero(found.flags)
    loss = selection.points.loss
    lines = [_line(float(loss[row]), float(found.expected[row])) for row in rows[:TOLD]]
    return replace(selection, warnings=[*selection.warnings, *by_row(selection.table, rows, lines)])


def _line(loss: float, expected: float) -> str:
    about = f"the loss {loss:.4g} is far from the {expected:.3g} that the other runs lead to expect"
    if loss > expected:
        return f"{about}; if the run diverged, drop it with --max-loss or --drop-highest"
    return f"{about}; if it is no result, take the row out"


# ---- end points


def outlying(points: Points) -> Outlying:
    """Which end points lie far from the robust surface, or above a gap."""
    if len(points) < FEWEST:
        return Outlying(np.zeros(len(points), dtype=bool), points.loss)
    theta = _robust(points.problem)
    fitted = _logarithm(theta, points.problem)
    off = points.problem.y - fitted
    far = np.where(points.tokens < UNDERTRAINED * points.params, FAR_UNDERTRAINED, FAR)
    flags = np.abs(off) > np.maximum(OUTLYING * _deviation(off) * (1 + 5 / max(len(points) - 3, 1)), far)
    return Outlying(flags | _beyond_a_gap(points.problem.y), np.exp(fitted))


def _robust(problem: Problem) -> Array:
    """theta (5,), with exponents on a grid."""
    some = problem.where(sample(len(problem))) if len(problem) > SAMPLE else problem
    cells = np.array([(alpha, beta) for alpha in EXPONENTS for beta in EXPONENTS])
    weights, theta = np.ones(len(some)), np.zeros(5)
    for _ in range(ROUNDS):
        solved, errors = projected(some, weights[None], cells)
        theta = np.asarray(solved[0, errors[0].argmin()])
        off = some.y - _logarithm(theta, some)
        weights = 1 / (1 + (off / (2 * _deviation(off))) ** 2)
        weights *= len(some) / weights.sum()
    return theta


def _logarithm(theta: Array, problem: Problem) -> Array:
    """The logarithm of the loss on the surface, (n,)."""
    a, b, e, alpha, beta = theta
    return np.asarray(np.logaddexp(np.logaddexp(a - alpha * problem.x, b - beta * problem.z), e))


def _deviation(off: Array) -> float:
    """A standard deviation that outliers do not move."""
    return max(1.4826 * float(np.median(np.abs(off))), 1e-9)


def _beyond_a_gap(y: Array) -> Flags:
    """Which points lie above the first gap in the upper half of the losses."""
    order = np.sort(y)
    above = order[len(y) // 2 :]
    gaps = np.flatnonzero(np.diff(above) > GAP)
    return y > above[gaps[0]] if len(gaps) else np.zeros(len(y), dtype=bool)


# ---- training curves


def spikes(points: Points) -> Outlying:
    """Points of one size are one training curve; a curve of few points is taken for end points."""
    y = np.log(points.loss)
    smooth, before = y.copy(), y.copy()  # (n,): around each point, and the least before it
    short = np.zeros(len(points), dtype=bool)
    for curve in training_curves(points.params, points.tokens):
        short[curve] = len(curve) < WIDE
        smooth[curve] = median_filter(y[curve], size=WIDE, mode="nearest")
        before[curve[1:]] = np.minimum.accumulate(smooth[curve])[:-1]
    far = max(OUTLYING * _deviation((y - smooth)[y != smooth]) if (y != smooth).any() else 0.0, FAR)
    high, low = y - before > far, y - smooth < -far
    flags, expected = high | low, np.exp(np.where(high, before, smooth))
    if short.any():
        ends = outlying(points.where(short))
        flags[short], expected[short] = ends.flags, ends.expected
    return Outlying(flags, expected)
