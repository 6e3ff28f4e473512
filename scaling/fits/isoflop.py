"""Approaches 1 and 2: the best size at each of several budgets, and the power laws through them.

    N_opt = k C^a,    D_opt = m C^b

Approach 2 lays a curve through loss against ln N at each budget and takes its minimum; a minimum at the edge of the sizes
is only a bound, so that budget is dropped, with a note. A parabola is biased wherever alpha and beta differ, the more so the
wider the sizes spread (its D_opt is 5 % low over a factor of 16 each way); a cubic takes up the skew. Akima's spline goes
through every point, noise too. Approach 1 takes, at each compute, the training curve that is lowest (Hoffmann et al. 2022,
arXiv 2203.15556; the parabola's bias: arXiv 2603.22339).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator
from scipy.stats import linregress, t as student

from madkernels.scaling.fits.form import Points
from madkernels.scaling.fits.statistics import Array, Interval, interval

NEEDED = {"parabola": 3, "cubic": 4, "akima": 5}  # sizes at a budget
NOWHERE = 2.0  # outside of the sizes, which are scaled to -1 .. 1
FINE = 2001  # places along an Akima spline
SHORT, OVER = 0.12, 0.03  # decades by which a run may fall short of its budget, or exceed it
COMPUTES = 1500  # of approach 1, as published
BELOW = 0.01  # share of the loss: a minimum so far below every run is reported
EDGE = 1e-12  # relative: the ends of a training curve belong to it
DRAWN = 2**22  # losses with noise added that are held at a time


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(offset) x^exponent."""

    offset: float
    exponent: float

    def at(self, x: float) -> float:
        return float(np.exp(self.offset + self.exponent * np.log(x)))


@dataclass(frozen=True)
class Best:
    """The best size at a compute, its tokens and loss; edge where it is only the smallest or the largest size.

    budget is the nominal compute, flops what its runs took in the geometric mean: the laws go through the latter.
    """

    budget: float
    flops: float
    params: float
    tokens: float
    loss: float
    edge: bool = False


@dataclass(frozen=True)
class Optimum:
    """Best sizes that the laws go through, budgets that are dropped and why, and 95 % intervals of a and b if drawn.

    warnings: minima that lie below every run.
    """

    best: list[Best]
    left_out: list[str]
    size: PowerLaw
    data: PowerLaw
    intervals: dict[str, Interval]
    unusable: int = 0  # resamples in which fewer than two budgets had a minimum
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    """Loss y against ln N x at a budget, each (n,); the mean ln C of the runs. cost: ln C/D over ln N, coefficients."""

    budget: float
    compute: float
    x: Array
    y: Array
    cost: Array

    def tokens(self, x: Array) -> Array:
        """ln D at ln N."""
        return np.asarray(self.compute - np.polynomial.polynomial.polyval(x - self.x.mean(), self.cost))


def isoflop(
    points: Points, flops: Array, budgets: Array, shape: str = "parabola", resamples: int = 0, seed: int = 42
) -> Optimum:
    """Approach 2. flops, budgets: (n,), what each point took, and its nominal budget (NaN: none).

    Intervals come from refits to the curves with noise added, drawn from the residuals about parabolas of all budgets.
    ValueError where fewer than two budgets have a minimum inside their sizes.
    """
    curves, left_out = curves_of(points, flops, budgets, shape)
    found = [lowest(c, shape) for c in curves]
    left_out += [_edge(b) for b in found if b.edge]
    best = [b for b in found if not b.edge]
    if len(best) < 2:
        raise ValueError("; ".join(["fewer than two budgets have a minimum inside their sizes", *left_out]))
    size, data = _laws(best)
    drawn = exponents(curves, draw_minima(curves, shape, resamples, np.random.default_rng(seed)))
    usable = drawn[np.isfinite(drawn).all(1)] if resamples else drawn
    intervals = {name: interval(usable[:, i]) for i, name in enumerate("ab")} if len(usable) else {}
    return Optimum(best, left_out, size, data, intervals, len(drawn) - len(usable), below_all(curves, found))


def given(params: Array, tokens: Array, flops: Array) -> Optimum:
    """The laws through best sizes that are known already, each (n,). Intervals of a and b are Student's, from three rows on.

    ValueError where all are of one budget.
    """
    if len(np.unique(flops)) < 2:
        raise ValueError(f"{len(flops)} best sizes at one budget; a line takes two budgets")
    rows = zip(flops.tolist(), params.tolist(), tokens.tolist(), strict=True)
    best = [Best(c, c, n, d, float("nan")) for c, n, d in sorted(rows)]
    intervals = {"a": _slope(flops, params), "b": _slope(flops, tokens)} if len(best) > 2 else {}
    return Optimum(best, [], *_laws(best), intervals)


def _slope(x: Array, y: Array) -> Interval:
    """The 95 % interval of the slope of a line through logarithms."""
    found: Any = linregress(np.log(x), np.log(y))
    reach = float(student.ppf(0.975, len(x) - 2)) * found.stderr
    return Interval(found.slope - reach, found.slope + reach)


def nearest_budgets(flops: Array, budgets: Sequence[float]) -> Array:
    """The nominal budget (n,) that each run was meant for; NaN where it is near none."""
    nominal = np.asarray(budgets, dtype=np.float64)
    off = np.log10(flops)[:, None] - np.log10(nominal)
    nearest = np.abs(off).argmin(1)
    distance = off[np.arange(len(flops)), nearest]
    return np.where((distance > -SHORT) & (distance < OVER), nominal[nearest], np.nan)


def curves_of(points: Points, flops: Array, budgets: Array, shape: str) -> tuple[list[Curve], list[str]]:
    """One curve per budget; and what is dropped for want of a budget or of sizes."""
    if shape not in NEEDED:
        raise ValueError(f"shape: {shape!r} is not known; expected {', '.join(NEEDED)}")
    known = np.isfinite(budgets)
    order = np.flatnonzero(known)[np.lexsort((points.params[known], budgets[known]))]
    curves, left_out = [], [] if known.all() else [f"{(~known).sum()} runs are near no budget"]
    for part in np.split(order, np.flatnonzero(np.diff(budgets[order])) + 1) if len(order) else []:
        sizes, budget = len(np.unique(points.params[part])), float(budgets[part[0]])
        if sizes < NEEDED[shape]:
            left_out.append(f"budget {budget:.3g}: {sizes} size{'s' * (sizes > 1)}; the {shape} takes {NEEDED[shape]}")
        else:
            curves.append(_curve(points, flops, budget, part))
    return curves, left_out


def _curve(points: Points, flops: Array, budget: float, chosen: NDArray[np.intp]) -> Curve:
    """The curve of a budget through rows in order of size."""
    x, compute = np.log(points.params[chosen]), np.log(flops[chosen])
    degree = min(2, len(np.unique(x)) - 1)  # a straight line where C = 6 N D holds exactly
    cost = np.polynomial.polynomial.polyfit(x - x.mean(), compute - np.log(points.tokens[chosen]), degree)
    return Curve(budget, float(compute.mean()), x, points.loss[chosen], cost)


def _edge(best: Best) -> str:
    return f"budget {best.budget:.3g}: the least loss is at the edge of the sizes, {best.params:.3g} parameters"


def below_all(curves: Sequence[Curve], best: Sequence[Best]) -> list[str]:
    """Budgets whose minimum lies below every run: their curve does not go with them."""
    return [
        f"budget {b.budget:.3g}: the curve's minimum, {b.loss:.4g}, lies below every run of it, the lowest of which is "
        f"{c.y.min():.4g}; look for a run that diverged, or for sizes too far apart"
        for c, b in zip(curves, best, strict=True)
        if b.loss < c.y.min() * (1 - BELOW)
    ]


def lowest(curve: Curve, shape: str) -> Best:
    """The curve's minimum, or the lowest run where that is at the edge."""
    at, loss = (float(values[0]) for values in minima(curve.x, curve.y[:, None], shape))
    edge = not np.isfinite(at)
    if edge:
        at, loss = float(curve.x[curve.y.argmin()]), float(curve.y.min())
    tokens = float(np.exp(curve.tokens(np.array(at))))
    return Best(curve.budget, float(np.exp(curve.compute)), float(np.exp(at)), tokens, loss, edge)


def through(curve: Curve, shape: str) -> Callable[[Array], Array]:
    """The loss over ln N that is laid through the runs of a budget."""
    if shape == "akima":
        places, which = np.unique(curve.x, return_inverse=True)
        spline = Akima1DInterpolator(places, np.bincount(which, curve.y) / np.bincount(which))
        return lambda x: np.asarray(spline(x))
    polynomial = np.polynomial.Polynomial.fit(curve.x, curve.y, NEEDED[shape] - 1)
    return lambda x: np.asarray(polynomial(x))


def minima(x: Array, y: Array, shape: str) -> tuple[Array, Array]:
    """Where each curve (n, draws) over x (n,) is least, and its value, (draws,).

    NaN where that is not inside of x, or no positive loss.
    """
    middle, spread = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
    t = (x - middle) / spread
    at, value = _spline_minima(t, y) if shape == "akima" else _polynomial_minima(t, y, 2 if shape == "parabola" else 3)
    inside = (np.abs(at) < 1) & (value > 0)
    return np.where(inside, middle + spread * at, np.nan), np.where(inside, value, np.nan)


def _polynomial_minima(t: Array, y: Array, degree: int) -> tuple[Array, Array]:
    c0, c1, c2, *rest = np.polynomial.polynomial.polyfit(t, y, degree)
    c3 = rest[0] if rest else np.zeros_like(c0)
    discriminant = c2**2 - 3 * c3 * c1  # of the derivative, whose upper root bends up
    below = c2 + np.sqrt(np.maximum(discriminant, 0))
    minimum = (discriminant > 0) & (below > 0)
    at = np.where(minimum, -c1 / np.where(minimum, below, 1), NOWHERE)
    return at, c0 + at * (c1 + at * (c2 + at * c3))


def _spline_minima(t: Array, y: Array) -> tuple[Array, Array]:
    places, which = np.unique(t, return_inverse=True)
    means = np.zeros((len(places), y.shape[1]))
    np.add.at(means, which, y / np.bincount(which)[which][:, None])
    fine = np.linspace(places[0], places[-1], FINE)
    values = Akima1DInterpolator(places, means)(fine)
    least = values.argmin(0)
    return fine[least], values.min(0)


def _laws(best: Sequence[Best]) -> tuple[PowerLaw, PowerLaw]:
    compute = np.log([b.flops for b in best])
    return line(compute, np.log([b.params for b in best])), line(compute, np.log([b.tokens for b in best]))


def line(x: Array, y: Array) -> PowerLaw:
    """Through logarithms (n,), by least squares."""
    offset, exponent = np.polynomial.polynomial.polyfit(x, y, 1)
    return PowerLaw(float(offset), float(exponent))


def about_parabola(x: Array, y: Array) -> tuple[Array, Array]:
    """The parabola through y (n,) over x (n,), and the residuals about it, widened for the parameters that it took."""
    smooth = np.polynomial.Polynomial.fit(x, y, 2)(x)
    return smooth, (y - smooth) * np.sqrt(len(y) / max(len(y) - 3, 1))


def draw_minima(curves: Sequence[Curve], shape: str, count: int, rng: np.random.Generator) -> Array:
    """ln N, ln D and the loss of the minima with noise added, (count, curves, 3).

    At an edge ln N and ln D are NaN, and the loss is the least one.
    """
    noise = np.concatenate([about_parabola(c.x, c.y)[1] for c in curves])
    found = np.empty((count, len(curves), 3))
    for i, curve in enumerate(curves):
        smooth, step = through(curve, shape)(curve.x)[:, None], max(DRAWN // len(curve.x), 1)
        for first in range(0, count, step):
            drawn = smooth + rng.choice(noise, (len(curve.x), min(step, count - first)))
            at, loss = minima(curve.x, drawn, shape)
            rows = np.stack([at, curve.tokens(at), np.where(np.isfinite(at), loss, drawn.min(0))], 1)
            found[first : first + len(rows), i] = rows
    return found


def exponents(curves: Sequence[Curve], drawn: Array) -> Array:
    """a and b of each draw of :func:`draw_minima`, (count, 2); NaN where fewer than two minima are inside."""
    compute = np.array([c.compute for c in curves])
    return np.array([_slopes(compute, row[:, :2]) for row in drawn])


def _slopes(compute: Array, rows: Array) -> Array:
    there = np.isfinite(rows[:, 0])
    if there.sum() < 2:
        return np.full(2, np.nan)
    slopes: Array = np.polynomial.polynomial.polyfit(compute[there], rows[there], 1)[1]
    return slopes


# ---- approach 1


def training_curves(params: Array, along: Array) -> Iterator[NDArray[np.intp]]:
    """By size, upwards: the rows of its training curve in order of tokens, or of FLOPs."""
    order = np.lexsort((along, params))
    yield from np.split(order, np.flatnonzero(np.diff(params[order])) + 1)


def envelope(points: Points, flops: Array) -> Optimum:
    """Approach 1. flops: (n,), at which the loss of each point was reached. Points of one size are one training curve.

    At each of 1500 computes the curve of least loss gives size and tokens; computes where that is the smallest or the
    largest size whose curve reaches there are dropped, for the best may lie beyond it. ValueError where none is left.
    """
    computes = np.geomspace(flops.min(), flops.max(), COMPUTES)
    rows = _lowest_curves(points, flops, computes)
    best = [Best(float(c), float(c), *row) for c, row in zip(computes, rows.tolist(), strict=True) if np.isfinite(row).all()]
    if len({b.params for b in best}) < 2:
        raise ValueError("the envelope of the training curves has fewer than two sizes inside the range of sizes")
    size, data = _laws(best)
    return Optimum(best, [], size, data, {})


def _lowest_curves(points: Points, flops: Array, computes: Array) -> Array:
    """Size, tokens and loss of the lowest curve at each compute, (computes, 3); NaN where that is the first or the last size
    that reaches there."""
    found = np.full((len(computes), 3), np.nan)
    least = np.full(len(computes), np.inf)
    first, last = np.full(len(computes), np.nan), np.full(len(computes), np.nan)
    for chosen in training_curves(points.params, flops):
        known = np.log(flops[chosen])
        reach = slice(*np.searchsorted(computes, flops[chosen[[0, -1]]] * [1 - EDGE, 1 + EDGE]))
        wanted = np.log(computes[reach])
        if not len(wanted):
            continue
        loss = np.interp(wanted, known, points.loss[chosen])
        tokens = np.exp(np.interp(wanted, known, np.log(points.tokens[chosen])))
        size = np.full(len(wanted), points.params[chosen[0]])
        lower = np.flatnonzero(loss < least[reach])
        found[reach][lower] = np.stack([size, tokens, loss], 1)[lower]
        least[reach][lower] = loss[lower]
        first[reach] = np.where(np.isnan(first[reach]), size, first[reach])
        last[reach] = size
    found[(found[:, 0] == first) | (found[:, 0] == last)] = np.nan
    return found
