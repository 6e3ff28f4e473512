"""Approach 3: one surface for the loss over size and data, fitted to all runs at once.

    L(N, D) = E + A / N^alpha + B / D^beta
    minimise over a = ln A, b = ln B, e = ln E, alpha, beta:
        sum_i Huber_delta(ln(exp(a - alpha ln N_i) + exp(b - beta ln D_i) + exp(e)) - ln L_i)

(Hoffmann et al. 2022, arXiv 2203.15556; Besiroglu et al. 2024, arXiv 2404.10102.) The minimum is what matters: fits that
stopped before it have been published with intervals far too narrow. So every fit starts from several independent seeds, and
says how many came to the same minimum, how flat the objective is there, and whether it curves up in all directions.

Seeds come by variable projection: given both exponents, E, A and B are the answer of a linear least-squares problem. A grid
of exponents is cut into blocks, and the best cell of each block is a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from madkernels.scaling.fits.form import PARAMETERS, Points, Problem, Surface, directions, recentred, surface_of
from madkernels.scaling.fits.newton import CHUNK, SQUARES, Minimum, minimise
from madkernels.scaling.fits.statistics import Array, Interval, interval

HUBER = 1e-3  # delta of the published recipe
LAD = 1e-8  # delta at which the fit is that of least absolute deviations: its residuals are all far larger, or zero

EXPONENTS = np.geomspace(0.05, 1.5, 12)  # alpha and beta of the grid that seeds come from
SEEDS = 9
FLOOR = 1e-3  # share of the mean loss: the least that a term of a seed may be
SAME_MINIMUM = 1e-6  # relative difference below which the values of two minima count as the same
FLAT = 1e-6  # scaled gradient at a minimum
SAME_PARAMETERS = 1e-3  # relative difference below which the parameters of two minima count as the same
CURVED = 1e-11  # relative to the largest eigenvalue: above this an eigenvalue is positive
SAMPLE = 5000  # rows beyond which seeds begin, and intervals are drawn, on so many of them
CLOSE = 1e-3  # delta at which minimising over all rows begins from a minimum over SAMPLE rows
ONE_SEED = 1e-6  # difference of the parameters below which two seeds have met, and go on as one


@dataclass(frozen=True)
class Proof:
    """What shows that a fit is at the minimum.

    gradient_norm: its largest component, as a part of the sum of its terms' sizes (0 at a minimum, near 1 far from it).
    seeds, agreeing: independent starts, and how many of them came to this minimum within 1e-6 of the objective.
    spread: the largest relative difference of a parameter of the surface among those.
    curvature: the least eigenvalue of the Hessian, as a part of the largest; not above 0 where the minimum is not strict.
    """

    gradient_norm: float
    seeds: int
    agreeing: int
    spread: float
    curvature: float

    @property
    def converged(self) -> bool:
        """Flat, curved up in all directions, and one place that two independent seeds at least have found."""
        return self.gradient_norm <= FLAT and self.curved and self.agreeing > 1 and self.spread <= SAME_PARAMETERS

    @property
    def curved(self) -> bool:
        """Whether the curvature is positive beyond rounding."""
        return self.curvature > CURVED

    def __str__(self) -> str:
        shape = "positive definite" if self.curved else "not positive definite"
        return (
            f"{'converged' if self.converged else 'NOT CONVERGED'}: gradient {self.gradient_norm:.1e}, {self.agreeing} of "
            f"{self.seeds} seeds at this minimum (parameters within {self.spread:.1e}), Hessian {shape}"
        )


@dataclass(frozen=True)
class Fit:
    """The surface, and the proof that it is at the minimum.

    objective: the sum over points of Huber_delta of ln L; of absolute values where delta is LAD; of squares of the loss
    itself where it is SQUARES.
    theta: (5,), the parameters in centred logarithms.
    """

    surface: Surface
    objective: float
    delta: float
    tied: bool
    count: int
    proof: Proof
    theta: Array

    @property
    def unit(self) -> float:
        """The objective is this times the value that is minimised."""
        return _unit(self.delta)

    @property
    def basis(self) -> Array:
        """The directions in which the parameters may move, (5, k)."""
        return directions(self.tied)


def _unit(delta: float) -> float:
    return {LAD: 1.0, SQUARES: 2.0}.get(delta, delta)


def fit(points: Points, delta: float = HUBER, *, tied: bool = False) -> Fit:
    """The minimum over all parameters, or with alpha = beta where `tied`. `delta=LAD` is least absolute deviations,
    `delta=SQUARES` least squares of the loss itself.

    ValueError where there are fewer points than parameters, or all points have one size or one number of tokens.
    """
    _check(points, tied)
    if not delta > 0:
        raise ValueError(f"delta: {delta}; expected a positive number")
    basis = directions(tied)
    found = _from_seeds(points.problem, delta, tied, basis)
    best = int(np.argmin(np.where(np.isfinite(found.value), found.value, np.inf)))
    surface = surface_of(found.theta[best], points.centre)
    objective = float(found.value[best]) * _unit(delta)
    return Fit(surface, objective, delta, tied, len(points), _proof(points, found, best, basis), found.theta[best])


def _from_seeds(problem: Problem, delta: float, tied: bool, basis: Array) -> Minimum:
    """Minima by seed. In a large table seeds walk on SAMPLE of its rows first; from there the minima of all are near."""
    some = problem.where(sample(len(problem))) if len(problem) > SAMPLE else problem
    weights = np.ones((1, len(some)))
    found = minimise(some, _seeds(some, weights, tied)[0], weights, delta, basis)
    if some is problem:
        return found
    alike = np.abs(found.theta[:, None] - found.theta).max(2) < ONE_SEED
    first = np.where(alike.any(1), alike.argmax(1), np.arange(len(alike)))
    distinct, seeds = np.unique(first, return_inverse=True)
    return minimise(problem, found.theta[distinct], np.ones((1, len(problem))), delta, basis, mild=CLOSE).where(seeds)


def sample(count: int) -> NDArray[np.intp]:
    """SAMPLE rows of `count`, always the same."""
    return np.sort(np.random.default_rng(0).choice(count, SAMPLE, replace=False))


def part_of(points: Points, fitted: Fit) -> tuple[Points, Fit, float]:
    """What intervals are drawn on: SAMPLE rows of a large table, else all; the fit to them; and a factor for the ends.

    Errors fall with the root of the number of rows, so the factor is the root of the part that was taken.
    """
    if len(points) <= SAMPLE:
        return points, fitted, 1.0
    some = points.where(sample(len(points)))
    return some, fit(some, fitted.delta, tied=fitted.tied), float(np.sqrt(len(some) / len(points)))


def _check(points: Points, tied: bool) -> None:
    needed = PARAMETERS - tied
    if len(points) < needed:
        raise ValueError(f"{len(points)} points cannot determine {needed} parameters")
    for name, values in (("size", points.params), ("number of tokens", points.tokens), ("loss", points.loss)):
        if values.min() == values.max():
            raise ValueError(f"all points have one {name}, {values[0]:g}: the surface cannot be told from them")


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # where the parameters are not determined
def _proof(points: Points, found: Minimum, best: int, basis: Array) -> Proof:
    least = found.value[best]
    same = found.value <= least * (1 + SAME_MINIMUM) + len(points) * 1e-12
    near = found.theta[same]
    spread = float(np.abs(np.expm1(near - near[0])).max()) if len(near) else np.inf
    curve = np.linalg.eigvalsh(basis.T @ found.hessian[best] @ basis)
    return Proof(float(found.gradient_norm[best]), len(found.value), int(same.sum()), spread, float(curve[0] / curve[-1]))


# ---- seeds


def _cells(tied: bool) -> Array:
    """Pairs of exponents (blocks, cells of a block, 2): the plane in 3 x 3 blocks, or its diagonal in 9."""
    if tied:
        along = np.geomspace(EXPONENTS[0], EXPONENTS[-1], 4 * SEEDS).reshape(SEEDS, 4)
        return np.stack([along, along], 2)
    thirds = EXPONENTS.reshape(3, -1)
    return np.array([[(alpha, beta) for alpha in rows for beta in columns] for rows in thirds for columns in thirds])


def _seeds(problem: Problem, weights: Array, tied: bool) -> Array:
    """theta (rows, blocks, 5), the best cell of each block under each row of weights (rows, n)."""
    cells = _cells(tied)
    solved, errors = projected(problem, weights, cells.reshape(-1, 2))
    shape = (len(weights), *cells.shape[:2])
    best = errors.reshape(shape).argmin(2)[:, :, None, None]
    return np.take_along_axis(solved.reshape(*shape, PARAMETERS), best, 2)[:, :, 0]


def projected(problem: Problem, weights: Array, cells: Array) -> tuple[Array, Array]:
    """theta (rows, cells, 5) and squared relative error (rows, cells) at exponents (cells, 2) under weights (rows, n).

    E, A and B are solved for, and kept above a floor. At fixed exponents the loss is linear in them: with c the coefficients
    and terms[i] what one unit of c[i] adds to the loss, as a share of it, the error sum_n w_n (sum_i c_i terms_in - 1)^2 is
    least where normal c = right.

    Letters of the sums: r rows of weights, c cells of the grid, n points, i and j the terms A, B, E.
    """
    loss = np.exp(problem.y)
    terms = np.stack([np.exp(-np.outer(cells[:, 0], problem.x)), np.exp(-np.outer(cells[:, 1], problem.z))])
    terms = np.concatenate([terms, np.ones_like(terms[:1])]) / loss  # icn
    products = np.einsum("icn,jcn->ncij", terms, terms).reshape(len(loss), -1)  # one row per point
    normal = (weights @ products).reshape(len(weights), len(cells), 3, 3)  # rcij
    right = np.einsum("rn,icn->rci", weights, terms)  # rci
    ridge = 1e-12 * np.trace(normal, axis1=2, axis2=3)[..., None, None] * np.eye(3)
    solved = np.maximum(np.linalg.solve(normal + ridge, right[..., None])[..., 0], FLOOR * loss.mean())
    errors = np.einsum("rci,rcij,rcj->rc", solved, normal, solved) - 2 * (solved * right).sum(2)
    exponents = np.broadcast_to(cells, (len(weights), *cells.shape))
    return np.concatenate([np.log(solved), exponents], 2), errors


# ---- intervals


@dataclass(frozen=True)
class Bootstrap:
    """Surfaces fitted to resamples of the points.

    unconverged: resamples whose gradient did not vanish. cold: those whose better minimum came from their own seed, not from
    the minimum of all points. rows: how many were resampled.
    """

    surfaces: list[Surface]
    unconverged: int
    cold: int
    rows: int

    def draws(self, name: str) -> Array:
        """The values of one of NAMES over the resamples, (resamples,)."""
        return np.array([getattr(surface, name) for surface in self.surfaces])

    def interval(self, name: str, level: float = 0.95) -> Interval:
        """The interval of one of NAMES, between percentiles of its draws."""
        return interval(self.draws(name), level)

    def losses(self, flops: float) -> Array:
        """The least loss at a budget, (resamples,); NaN where a surface has none."""
        return np.array([surface.optimum(flops).loss for surface in self.surfaces])


def resamples(points: int, count: int, seed: int) -> Array:
    """How often each point is drawn, (count, points): the draws of `numpy.random.seed(seed)` and `numpy.random.choice`."""
    state = np.random.RandomState(seed)  # that of the published intervals
    return np.array([np.bincount(state.choice(points, points), minlength=points) for _ in range(count)], dtype=np.float64)


def bootstrap(points: Points, fitted: Fit, count: int = 4000, seed: int = 42) -> Bootstrap:
    """Each resample is fitted from the minimum of all points and from its own best seed; the better one is kept.

    Of a large table SAMPLE rows are resampled, and what their parameters differ by is brought to the number of all rows.
    """
    some, own, narrower = part_of(points, fitted)
    problem, weights = some.problem, resamples(len(some), count, seed)
    warm = minimise(problem, np.repeat(own.theta[None], count, 0), weights, fitted.delta, fitted.basis)
    starts = np.concatenate([_coldest(problem, weights[i : i + CHUNK], fitted.tied) for i in range(0, count, CHUNK)])
    cold = minimise(problem, starts, weights, fitted.delta, fitted.basis)
    better = cold.value < warm.value * (1 - SAME_MINIMUM)
    theta = np.where(better[:, None], cold.theta, warm.theta)
    norm = np.where(better, cold.gradient_norm, warm.gradient_norm)
    if some is not points:
        theta = recentred(fitted.theta, points.centre, some.centre) + narrower * (theta - own.theta)
    surfaces = [surface_of(row, some.centre) for row in theta]
    return Bootstrap(surfaces, int((norm > FLAT).sum()), int(better.sum()), len(some))


def _coldest(problem: Problem, weights: Array, tied: bool) -> Array:
    """The best cell of the whole grid, theta (rows, 5)."""
    solved, errors = projected(problem, weights, _cells(tied).reshape(-1, 2))
    best: Array = solved[np.arange(len(weights)), errors.argmin(1)]
    return best
