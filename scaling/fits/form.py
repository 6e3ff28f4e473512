"""The form of the surface: its parameters, their names and order, its terms, and what can be held fixed.

    L(N, D) = E + A / N^alpha + B / D^beta

It is fitted as theta = (a, b, e, alpha, beta), with a = ln A, b = ln B, e = ln E about the means of ln N and ln D: see
:mod:`madkernels.scaling.fits.newton` for why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import null_space

from madkernels.scaling.fits.statistics import Array

FLOPS = 6.0  # per parameter and token, forward and backward
NAMES = ("E", "A", "B", "alpha", "beta", "a", "b")
PARAMETERS = 5  # of theta
TIED = np.array([[0.0, 0.0, 0.0, 1.0, -1.0]])  # alpha - beta = 0


@dataclass(frozen=True)
class Problem:
    """Points (n,) to fit: centred logarithms of size and data, logarithm of loss."""

    x: Array
    z: Array
    y: Array

    def __len__(self) -> int:
        return len(self.y)

    def where(self, chosen: NDArray[np.intp] | slice) -> Problem:
        return Problem(self.x[chosen], self.z[chosen], self.y[chosen])


@dataclass(frozen=True)
class Points:
    """Runs: parameters, tokens and loss in nats per token, each (n,), finite and positive. ValueError if they are not."""

    params: Array
    tokens: Array
    loss: Array

    def __post_init__(self) -> None:
        for name in ("params", "tokens", "loss"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            object.__setattr__(self, name, values)
            if values.shape != self.params.shape or values.ndim != 1:
                raise ValueError(f"{name}: shape {values.shape}; expected ({np.size(self.params)},), as that of params")
            if not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"{name}: values must be finite and positive")

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Points:
        return Points(self.params[chosen], self.tokens[chosen], self.loss[chosen])

    @cached_property
    def centre(self) -> tuple[float, float]:
        """Means of ln N and ln D."""
        return float(np.log(self.params).mean()), float(np.log(self.tokens).mean())

    @cached_property
    def problem(self) -> Problem:
        x, z = self.centre
        return Problem(np.log(self.params) - x, np.log(self.tokens) - z, np.log(self.loss))


@dataclass(frozen=True)
class Allocation:
    """The size and the tokens that make the best of a budget, and the loss they come to."""

    flops: float
    params: float
    tokens: float
    loss: float


def no_optimum(flops: float) -> Allocation:
    return Allocation(flops, float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class Surface:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """The exponent of the optimal size, N_opt ~ C^a."""
        return self.beta / (self.alpha + self.beta) if self.alpha + self.beta else float("nan")

    @property
    def b(self) -> float:
        """The exponent of the optimal data, D_opt ~ C^b."""
        return self.alpha / (self.alpha + self.beta) if self.alpha + self.beta else float("nan")

    def loss(self, params: ArrayLike, tokens: ArrayLike) -> Array:
        size, data = np.asarray(params, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return np.asarray(self.E + self.A * size**-self.alpha + self.B * data**-self.beta)

    def optimum(self, flops: float, factor: float = FLOPS) -> Allocation:
        """The best split of a budget C = factor N D: there, alpha A / N^alpha = beta B / D^beta.

        NaN where an exponent is not positive: the more on one side then, the better.
        """
        if not (self.alpha > 0 and self.beta > 0):
            return no_optimum(flops)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # of a surface far beyond any run
            balance = np.log(self.alpha / self.beta) + np.log(self.A) - np.log(self.B)
            params = np.exp((balance + self.beta * np.log(flops / factor)) / (self.alpha + self.beta))
            tokens = flops / factor / params
            return Allocation(flops, float(params), float(tokens), float(self.loss(params, tokens)))


def surface_of(theta: Array, centre: tuple[float, float]) -> Surface:
    a, b, e, alpha, beta = (float(value) for value in theta)
    x, z = centre
    with np.errstate(over="ignore"):
        return Surface(float(np.exp(e)), float(np.exp(a + alpha * x)), float(np.exp(b + beta * z)), alpha, beta)


def recentred(theta: Array, old: tuple[float, float], new: tuple[float, float]) -> Array:
    """(5,), about other means of ln N and ln D."""
    a, b, e, alpha, beta = theta
    return np.array([a + alpha * (old[0] - new[0]), b + beta * (old[1] - new[1]), e, alpha, beta])


def shares(problem: Problem, theta: Array) -> tuple[Array, Array, Array, Array]:
    """Residuals (rows, n), and what part of the loss is due to size, to data, and irreducible."""
    a, b, e, alpha, beta = (column[:, None] for column in theta.T)
    size, data = a - alpha * problem.x, b - beta * problem.z
    top = np.maximum(np.maximum(size, data), e)
    size, data, rest = np.exp(size - top), np.exp(data - top), np.exp(e - top)
    total = size + data + rest
    return top + np.log(total) - problem.y, size / total, data / total, rest / total


def directions(tied: bool) -> Array:
    return np.asarray(null_space(TIED)) if tied else np.eye(PARAMETERS)


def constraint(name: str, value: float, centre: tuple[float, float]) -> tuple[Array, float]:
    """The constraint `name` = value as coefficients of theta (5,) and a right side."""
    x, z = centre
    along: dict[str, tuple[list[float], float]] = {
        "A": ([1, 0, 0, x, 0], value),
        "B": ([0, 1, 0, 0, z], value),
        "E": ([0, 0, 1, 0, 0], value),
        "alpha": ([0, 0, 0, 1, 0], value),
        "beta": ([0, 0, 0, 0, 1], value),
        "a": ([0, 0, 0, -value, 1 - value], 0.0),
        "b": ([0, 0, 0, 1 - value, -value], 0.0),
    }
    normal, right = along[name]
    return np.array(normal, dtype=np.float64), right
