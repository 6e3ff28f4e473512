"""The objective of approach 3 and its minimum, for many weightings of the same points at once.

    sum_i w_i Huber_delta(r_i) / delta,    r_i = ln(exp(a - alpha x_i) + exp(b - beta z_i) + exp(e)) - ln L_i

or, where delta is SQUARES, half of the squares of the loss itself: w_i (L_i exp(r_i) - L_i)^2 / 2.

x and z are ln N and ln D less their means: uncentred, a goes almost along with alpha and a minimiser crawls in the valley.
Divided by delta the objective is about the sum of |r|. At its own scale of 1e-3 the stopping rules of general minimisers
hold at once, and they report success far from the minimum.

A resample with replacement is a row of counts w, so thousands of bootstrap fits are one minimisation over an array of rows.
Each Hessian is a few products of (rows, points) matrices with powers of x and z, so Newton's method costs no more than the
gradient does. Where a Hessian is indefinite its eigenvalues count by their size (the step still goes down), and each row has
its own damping. A small delta is reached from a large one: the minimum of the smoother objective starts the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from madkernels.scaling.fits.form import PARAMETERS, Problem, shares
from madkernels.scaling.fits.statistics import Array

CHUNK = 128  # rows of theta that are minimised at a time
BLOCK = 2**18  # elements of the (rows, points) arrays that are held at a time
STEPS = 200  # Newton steps at each delta, at most
TOLERANCE = 1e-8  # scaled gradient at which a row is done
MILD = 3e-2  # descent begins at a delta below this, where most residuals of a log-loss are inside
UNSEEN = 1e-17  # share of the value: a change that is lost in rounding
TINY = 1e-200  # instead of a curvature of zero
ROUNDING = 1e-10  # residuals below this are those of an exact surface
SQUARES = np.inf  # in place of a delta: squares of the loss itself, not of its logarithm


@dataclass(frozen=True)
class Minimum:
    """theta (rows, 5), value (rows,) of the objective over delta, scaled gradient norm (rows,), hessian (rows, 5, 5)."""

    theta: Array
    value: Array
    gradient_norm: Array
    hessian: Array

    def where(self, rows: NDArray[np.intp]) -> Minimum:
        return Minimum(self.theta[rows], self.value[rows], self.gradient_norm[rows], self.hessian[rows])


@dataclass
class Point:
    """The objective at theta (rows, 5): value, gradient, Hessian, and the size of the gradient's terms to measure it by."""

    theta: Array
    value: Array
    gradient: Array
    hessian: Array
    size: Array

    def keep(self, rows: NDArray[np.intp], other: Point, of: NDArray[np.bool_]) -> None:
        """Takes those of `other` that `of` marks into `rows`."""
        for name in ("theta", "value", "gradient", "hessian", "size"):
            getattr(self, name)[rows[of]] = getattr(other, name)[of]

    def add(self, other: Point) -> None:
        """The sums over other points at the same theta."""
        for name in ("value", "gradient", "hessian", "size"):
            getattr(self, name).__iadd__(getattr(other, name))


def evaluate(problem: Problem, theta: Array, weights: Array, delta: float) -> Point:
    """theta (rows, 5), weights (rows or 1, n). Points are taken in blocks, so that memory does not grow with them."""
    step = max(BLOCK // max(len(theta), 1), 1)
    blocks = [slice(i, i + step) for i in range(0, len(problem), step)]
    total = _evaluate(problem.where(blocks[0]), theta, weights[:, blocks[0]], delta)
    for block in blocks[1:]:
        total.add(_evaluate(problem.where(block), theta, weights[:, block], delta))
    return total


def _evaluate(problem: Problem, theta: Array, weights: Array, delta: float) -> Point:
    r, size, data, rest = shares(problem, theta)
    cost, slope, bend, least = _of_loss(r, np.exp(2 * problem.y)) if delta == SQUARES else _huber(r, delta)
    value, pull = (weights * cost).sum(1), weights * slope
    scale = np.maximum(np.abs(pull), weights * least).sum(1)
    x, z = problem.x, problem.z
    by_term = (pull * size).sum(1), (pull * data).sum(1), (pull * rest).sum(1)
    gradient = np.stack([*by_term, -(pull * size) @ x, -(pull * data) @ z], 1)
    hessian = _hessian(x, z, size, data, rest, pull, weights * bend)
    return Point(theta, value, gradient, hessian, scale)


def _huber(r: Array, delta: float) -> tuple[Array, Array, Array, float]:
    """Huber's function over delta at r, its two derivatives, and a slope that is that of rounding."""
    inside = np.abs(r) < delta
    cost = np.where(inside, r * r / (2 * delta), np.abs(r) - delta / 2)
    return cost, np.clip(r / delta, -1, 1), inside / delta, min(ROUNDING / delta, 1)


def _of_loss(r: Array, square: Array) -> tuple[Array, Array, Array, Array]:
    """The same of half of the squared error of the loss, square (n,) being that of the loss."""
    times = np.exp(r)
    return square * (times - 1) ** 2 / 2, square * (times - 1) * times, square * (2 * times - 1) * times, square * ROUNDING


def _hessian(x: Array, z: Array, size: Array, data: Array, rest: Array, pull: Array, curve: Array) -> Array:
    """The Hessian of the objective, (rows, 5, 5), from what each term is of the loss: size, data, rest (rows, n).

    r is the logarithm of a sum of three exponentials. Its gradient in their exponents is s = (size, data, rest), and its
    Hessian diag(s) - s s'. The exponents are linear in theta: a - alpha x, b - beta z, e. So an entry is a sum over points
    of a product of shares, times -x for each derivative by alpha and -z for each by beta: `size_data[:, 3]` has x z.

    pull, curve: first and second derivative of the weighted cost of a point at r, (rows, n).
    """
    bend = curve - pull
    bend_size, bend_data = bend * size, bend * data
    ones = np.ones_like(x)
    size_size = (bend_size * size + pull * size) @ np.stack([ones, x, x * x], 1)
    data_data = (bend_data * data + pull * data) @ np.stack([ones, z, z * z], 1)
    size_data = (bend_size * data) @ np.stack([ones, x, z, x * z], 1)
    size_rest = (bend_size * rest) @ np.stack([ones, x], 1)
    data_rest = (bend_data * rest) @ np.stack([ones, z], 1)
    rest_rest = (bend * rest * rest + pull * rest).sum(1)
    a, b, e, alpha, beta = range(PARAMETERS)
    upper = {
        (a, a): size_size[:, 0], (a, b): size_data[:, 0], (a, e): size_rest[:, 0],
        (a, alpha): -size_size[:, 1], (a, beta): -size_data[:, 2],
        (b, b): data_data[:, 0], (b, e): data_rest[:, 0], (b, alpha): -size_data[:, 1], (b, beta): -data_data[:, 1],
        (e, e): rest_rest, (e, alpha): -size_rest[:, 1], (e, beta): -data_rest[:, 1],
        (alpha, alpha): size_size[:, 2], (alpha, beta): size_data[:, 3],
        (beta, beta): data_data[:, 2],
    }  # fmt: skip
    hessian = np.empty((len(size), PARAMETERS, PARAMETERS))
    for (i, j), values in upper.items():
        hessian[:, i, j] = hessian[:, j, i] = values
    return hessian


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # of steps that go too far, which are not taken
def minimise(
    problem: Problem, start: Array, weights: Array, delta: float, basis: Array | None = None, mild: float = MILD
) -> Minimum:
    """The minimum from each row of start (rows, 5), under its weights (rows or 1, n), by way of deltas up to `mild`.

    Steps stay in the span of `basis`, (5, k) or (rows, 5, k): the whole space if absent. What it excludes (tied exponents, a
    value held fixed) holds at the start and so at the end.
    """
    rows = len(start)
    inside = np.eye(PARAMETERS) if basis is None else basis
    inside = np.broadcast_to(inside, (rows, *inside.shape[-2:]))
    parts = [slice(i, i + CHUNK) for i in range(0, rows, CHUNK)]
    found = [_minimise(problem, start[part], _weights_of(weights, part), delta, inside[part], mild) for part in parts]
    return Minimum(*(np.concatenate([getattr(m, name) for m in found]) for name in Minimum.__annotations__))


def _weights_of(weights: Array, rows: NDArray[np.intp] | slice) -> Array:
    """The weights of some rows; one row of weights that serves all is not copied."""
    return weights if len(weights) == 1 else weights[rows]


def _minimise(problem: Problem, start: Array, weights: Array, delta: float, basis: Array, mild: float) -> Minimum:
    for milder in _milder(delta, mild):
        start = _descend(problem, start, weights, milder, basis).theta
    point = _descend(problem, start, weights, delta, basis)
    return Minimum(point.theta, point.value, _norm(point, basis), point.hessian)


def _milder(delta: float, mild: float) -> list[float]:
    """Deltas on the way down, by tens."""
    return [delta * 10.0**i for i in range(20, 0, -1) if delta * 10.0**i <= mild]


def _norm(point: Point, basis: Array) -> Array:
    """The gradient's largest component, as a part of the sum of its terms' sizes: 0 at a minimum, about 1 far away."""
    within: Array = np.abs(np.einsum("rik,ri->rk", basis, point.gradient)).max(1) / point.size
    return within


def _descend(problem: Problem, theta: Array, weights: Array, delta: float, basis: Array) -> Point:
    """Newton steps until the gradient vanishes, or no shorter step could still be seen in the value."""
    point = evaluate(problem, theta.copy(), weights, delta)
    damping = 1e-3 * np.abs(np.trace(point.hessian, axis1=1, axis2=2))
    stuck = np.zeros(len(theta), dtype=bool)
    for _ in range(STEPS):
        rows = np.flatnonzero((_norm(point, basis) > TOLERANCE) & ~stuck)
        if not len(rows):
            break
        step = _step(point, basis, damping, rows)
        trial = evaluate(problem, point.theta[rows] + step, _weights_of(weights, rows), delta)
        better = trial.value < point.value[rows]
        promised = -(point.gradient[rows] * step).sum(1)
        stuck[rows] = ~better & (promised < UNSEEN * point.value[rows])
        damping[rows] *= np.where(better, 1 / 8, 6)
        point.keep(rows, trial, better)
    return point


def _step(point: Point, basis: Array, damping: Array, rows: NDArray[np.intp]) -> Array:
    """Newton's step within the basis, damped; negative eigenvalues count by their size."""
    inside = basis[rows]
    across = inside.transpose(0, 2, 1)
    curve, axes = np.linalg.eigh(across @ point.hessian[rows] @ inside)
    along = axes.transpose(0, 2, 1) @ (across @ point.gradient[rows, :, None])
    damped = np.abs(curve) + damping[rows, None] + TINY
    step: Array = -(inside @ (axes @ (along / damped[:, :, None])))[:, :, 0]
    return step
