"""Profile intervals: how far a parameter can be moved before the best fit with it held there is refuted.

The errors of ln L are taken as independent, with the density whose most likely parameters are the fit:

    exp(-Huber_delta(r) / s) / Z(s),    Z(s) = sqrt(2 pi s) erf(delta / sqrt(2 s)) + 2 s / delta exp(-delta^2 / (2 s))

The scale s is estimated along with the parameters, so twice the drop of the log-likelihood is compared with chi-squared
of one degree. The density is Laplace's where delta is far below the residuals, and normal where it is far above. Of
squares of the loss itself the errors of L are taken as normal.

To hold a parameter is a linear constraint on (a, b, e, alpha, beta), also for the exponent a = beta / (alpha + beta), so the
same minimiser walks in the plane that is left. All ends are sought at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import null_space
from scipy.optimize import brentq, minimize_scalar
from scipy.special import erf
from scipy.stats import chi2

from madkernels.scaling.fits.form import NAMES, TIED, Points, constraint
from madkernels.scaling.fits.newton import SQUARES, minimise
from madkernels.scaling.fits.statistics import Array, Interval
from madkernels.scaling.fits.surface import LAD, Fit, part_of

LOGARITHMS = ("E", "A", "B")  # walked along in the logarithm
STEP = 0.01  # the first one outwards
EXACT = 1e-6  # to which an end is known
TINY = 1e-300  # of a parameter that is nothing
EXACT_MEAN = 1e-30  # of Huber's function, in place of that of points without any scatter
FAR = 30.0  # beyond this a parameter is not bounded


def profile(points: Points, fitted: Fit, level: float = 0.95) -> dict[str, Interval]:
    """By parameter; 0 or infinity where the points do not bound it. A tied fit has no interval for a and b.

    Of a large table it is that of some of its rows, brought to the number of all.
    """
    names = [name for name in NAMES if not (fitted.tied and name in ("a", "b"))]
    some, own, narrower = part_of(points, fitted)
    mean = max(own.objective / own.count, EXACT_MEAN)
    highest = _refuted_mean(mean, own.delta, float(chi2.ppf(level, 1)) / (2 * own.count)) * own.count
    at, there = np.array(_along(own, names) * 2), np.array(_along(fitted, names) * 2)
    ends = _ends(some, own, names * 2, at, np.repeat([-1.0, 1.0], len(names)), highest / own.unit)
    if some is not points:
        ends = there + narrower * (ends - at)
    found = {}
    for name, low, high in zip(names, *ends.reshape(2, -1), strict=True):
        with np.errstate(over="ignore"):
            low, high = (float(np.exp(low)), float(np.exp(high))) if name in LOGARITHMS else (float(low), float(high))
        found[name] = Interval(low, high)
    return found


def _along(fitted: Fit, names: list[str]) -> list[float]:
    """The parameters, as they are walked along."""
    values = [getattr(fitted.surface, name) for name in names]
    return [
        float(np.log(np.clip(v, TINY, 1 / TINY))) if name in LOGARITHMS else v for name, v in zip(names, values, strict=True)
    ]


def _refuted_mean(mean: float, delta: float, drop: float) -> float:
    """The mean of Huber's function at which a point's log-likelihood is lower by `drop`."""
    if delta == LAD:  # Laplace's density in the limit
        return mean * float(np.exp(drop))
    if delta == SQUARES:  # normal errors of the loss
        return mean * float(np.exp(2 * drop))
    top, high = _log_likelihood(mean, delta), 2 * mean
    while top - _log_likelihood(high, delta) < drop:
        high *= 2
    end: Any = brentq(lambda value: top - _log_likelihood(value, delta) - drop, mean, high)
    return float(end)


def _log_likelihood(mean: float, delta: float) -> float:
    """The log-likelihood of a point, at the most likely scale of the errors."""

    def minus(log_scale: float) -> float:
        s = np.exp(log_scale)
        mass = np.sqrt(2 * np.pi * s) * erf(delta / np.sqrt(2 * s)) + 2 * s / delta * np.exp(-(delta**2) / (2 * s))
        return float(mean / s + np.log(mass))

    around = (np.log(mean) - 5, np.log(mean) + 5)
    found: Any = minimize_scalar(minus, bounds=around, method="bounded", options={"xatol": 1e-9})
    return -float(found.fun)


def _ends(points: Points, fitted: Fit, names: list[str], at: Array, sides: Array, highest: float) -> Array:
    """From `at` (rows,) outwards: steps double until the objective is too high, then halve towards the place where it is."""
    start, theta = at, np.repeat(fitted.theta[None], len(at), 0)
    steps, growing = np.full(len(at), STEP), np.ones(len(at), dtype=bool)
    weights = np.ones((1, len(points)))
    while True:
        rows = np.flatnonzero((steps > EXACT) & (np.abs(at - start) < FAR))
        if not len(rows):
            return np.where(growing, sides * np.inf, at)
        there = at[rows] + sides[rows] * steps[rows]
        planes = [
            _plane(names[row], value, points.centre, fitted.tied, theta[row]) for row, value in zip(rows, there, strict=True)
        ]
        begin, basis = (np.array(parts) for parts in zip(*planes, strict=True))
        found = minimise(points.problem, begin, weights, fitted.delta, basis)
        inside = found.value <= highest
        at, theta = at.copy(), theta.copy()
        at[rows[inside]], theta[rows[inside]] = there[inside], found.theta[inside]
        growing[rows[~inside]] = False
        steps[rows] = np.where(growing[rows], steps[rows] * 2, steps[rows] / 2)


def _plane(name: str, value: float, centre: tuple[float, float], tied: bool, theta: Array) -> tuple[Array, Array]:
    """The plane in which the parameter has this value: its point nearest to theta (5,), and its directions (5, k)."""
    normal, right = constraint(name, value, centre)
    normals = np.vstack([normal, TIED]) if tied else normal[None]
    rights = np.array([right, 0.0])[: len(normals)]
    return theta + np.linalg.pinv(normals) @ (rights - normals @ theta), null_space(normals)
