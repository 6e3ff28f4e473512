"""The surface's fit: published figures, known answers, derivatives, and what it says of itself."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from scaling_points import SURFACE, chinchilla, grid
from scipy.optimize import minimize

from madkernels.scaling.fits import newton, screening, surface
from madkernels.scaling.fits.form import Points
from madkernels.scaling.fits.profile_likelihood import profile

FIELDS = ("E", "A", "B", "alpha", "beta")


def values(surface: surface.Surface) -> list[float]:
    return [getattr(surface, name) for name in FIELDS]


# ---- published figures


def test_huber_optimum_of_the_chinchilla_points() -> None:
    found = surface.fit(chinchilla())
    assert found.count == 240
    assert values(found.surface) == pytest.approx([1.81722, 477.826, 2143.42, 0.34731, 0.36717], rel=1e-5)
    assert found.objective == pytest.approx(1.0182740178e-3, rel=1e-9)
    assert found.surface.a == pytest.approx(0.51390, abs=5e-6)
    best = found.surface.optimum(5.76e23)
    assert best.tokens / best.params == pytest.approx(17.92, abs=0.005)
    assert found.proof.converged
    assert found.proof.agreeing == found.proof.seeds == 9


def test_least_absolute_deviations_is_the_published_headline() -> None:
    """Besiroglu et al. fit a scale along; it went to 4.7e-6, so their Huber loss is an absolute value."""
    found = surface.fit(chinchilla(), surface.LAD)
    assert values(found.surface) == pytest.approx([1.8172, 482.01, 2085.43, 0.3478, 0.3658], rel=2e-4)
    assert values(found.surface) == pytest.approx([1.81686, 482.005, 2085.43, 0.34781, 0.36585], rel=2e-5)
    assert found.proof.converged


def test_all_chinchilla_points() -> None:
    found = surface.fit(chinchilla(drop_highest=0))
    assert found.count == 245
    assert values(found.surface) == pytest.approx([1.89134, 495.72, 12845, 0.34931, 0.45305], rel=5e-5)
    assert found.objective == pytest.approx(1.8260105e-3, rel=1e-7)


@pytest.mark.parametrize(
    ("delta", "e", "beta"), [(1e-2, 1.83808, 0.38154), (1e-4, 1.81582, 0.36538), (1e-5, 1.81668, 0.36576)]
)
def test_other_deltas(delta: float, e: float, beta: float) -> None:
    found = surface.fit(chinchilla(), delta)
    assert (found.surface.E, found.surface.beta) == pytest.approx((e, beta), abs=6e-6)


def test_published_bootstrap() -> None:
    """4,000 resamples of seed 42. The published fits of A's lower end (285.21) stopped short: converged it is 286.09."""
    points = chinchilla()
    drawn = surface.bootstrap(points, surface.fit(points), 4000, seed=42)
    assert (len(drawn.surfaces), drawn.unconverged) == (4000, 0)
    sd = [drawn.interval(name).sd for name in FIELDS]
    assert sd == pytest.approx([0.0257, 124.5, 1293.3, 0.0154, 0.0206], rel=4e-3)
    ends = {
        "A": (286.09, 743.61),
        "B": (1042.4, 5810.4),
        "E": (1.769, 1.871),
        "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
    }
    for name, (low, high) in ends.items():
        found = drawn.interval(name)
        assert (found.low, found.high) == pytest.approx((low, high), rel=2e-3), name
    narrow = drawn.interval("a", 0.8)
    assert (narrow.low, narrow.high) == pytest.approx((0.4913, 0.5428), abs=2e-4)
    assert drawn.draws("a").mean() == pytest.approx(0.5165, abs=1e-4)


# ---- known answers


@pytest.mark.parametrize("delta", [1e-3, 1.0, surface.LAD])
def test_an_exact_surface_is_recovered(delta: float) -> None:
    found = surface.fit(grid(), delta)
    assert values(found.surface) == pytest.approx(values(SURFACE), rel=1e-9)
    assert found.proof.converged


def test_tied_exponents() -> None:
    tied = dataclasses.replace(SURFACE, beta=SURFACE.alpha)
    found = surface.fit(grid(surface=tied), tied=True)
    assert values(found.surface) == pytest.approx(values(tied), rel=1e-9)
    assert found.surface.a == pytest.approx(0.5)
    free, held = (surface.fit(grid(noise=0.01), tied=tied) for tied in (False, True))
    assert held.objective > free.objective, "the constraint costs something where it does not hold"
    assert held.surface.alpha == pytest.approx(held.surface.beta, rel=1e-12)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside, trials = {"bootstrap": 0, "profile": 0}, 20
    for seed in range(trials):
        points = grid(noise=0.01, seed=seed)
        found = surface.fit(points)
        intervals = {
            "bootstrap": surface.bootstrap(points, found, 100, seed=seed).interval("a", 0.9),
            "profile": profile(points, found, 0.9)["a"],
        }
        for name, interval in intervals.items():
            inside[name] += interval.low < SURFACE.a < interval.high
    assert inside["bootstrap"] >= 15
    assert inside["profile"] >= 13  # the noise is normal, the density of this delta nearly Laplace's


def test_profile_against_normal_theory() -> None:
    """Under squares the ends are about 1.96 standard errors of the linearised fit away."""
    points = grid(noise=0.003)
    found = surface.fit(points, 1.0)
    curve = newton.evaluate(points.problem, found.theta[None], np.ones((1, 64)), 1.0).hessian[0]
    error = np.sqrt(np.linalg.inv(curve)[3, 3] * 2 * found.objective / 64)
    ends = profile(points, found)["alpha"]
    assert (ends.high - ends.low) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_optimum_is_the_least_loss_of_a_budget() -> None:
    best = SURFACE.optimum(1e21)
    assert 6 * best.params * best.tokens == pytest.approx(1e21)
    others = best.params * np.geomspace(0.5, 2, 201)
    losses = SURFACE.loss(others, 1e21 / 6 / others)
    assert losses.argmin() == 100
    assert SURFACE.optimum(1e21, factor=3).params == pytest.approx(SURFACE.optimum(2e21).params)
    exponent = np.log(SURFACE.optimum(1e22).params / best.params) / np.log(10)
    assert exponent == pytest.approx(SURFACE.a)
    assert SURFACE.a + SURFACE.b == pytest.approx(1)


def test_without_positive_exponents_there_is_no_optimum() -> None:
    for alpha, beta in ((-0.1, 0.3), (0.3, -0.1), (-0.2, -0.2), (0.0, 0.3), (0.2, -0.2)):
        surface = dataclasses.replace(SURFACE, alpha=alpha, beta=beta)
        best = surface.optimum(1e20)
        assert best.flops == 1e20
        assert np.isnan([best.params, best.tokens, best.loss]).all()
    assert np.isnan(surface.a), "alpha + beta is zero"


# ---- large tables


def large(count: int) -> Points:
    rng = np.random.default_rng(0)
    params, tokens = 10 ** rng.uniform(7, 10.5, count), 10 ** rng.uniform(9, 12, count)
    return Points(params, tokens, SURFACE.loss(params, tokens) * np.exp(0.01 * rng.standard_normal(count)))


def test_blocks_of_points_give_what_all_give(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, theta = grid(noise=0.01).problem, np.array([[0.1, 0.2, 0.5, 0.3, 0.35]]) + np.zeros((3, 1))
    weights = np.random.default_rng(0).integers(0, 3, (3, 64)).astype(float)
    whole = newton.evaluate(problem, theta, weights, 1e-3)
    monkeypatch.setattr(newton, "BLOCK", 3 * 7)
    parts = newton.evaluate(problem, theta, weights, 1e-3)
    for name in ("theta", "value", "gradient", "hessian", "size"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, err_msg=name)


def test_seeds_of_a_large_table_come_to_the_minimum_of_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    points = large(2000)
    whole = surface.fit(points)
    monkeypatch.setattr(surface, "SAMPLE", 300)
    found = surface.fit(points)
    assert values(found.surface) == pytest.approx(values(whole.surface), rel=2e-6)  # as exact as either proof
    assert found.objective == pytest.approx(whole.objective, rel=1e-12)
    assert (found.count, found.proof.converged, found.proof.agreeing) == (2000, True, 9)


def test_intervals_of_a_large_table_are_about_those_of_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    points = large(1500)
    fitted = surface.fit(points)
    whole = surface.bootstrap(points, fitted, 100), profile(points, fitted)
    monkeypatch.setattr(surface, "SAMPLE", 500)
    some = surface.bootstrap(points, fitted, 100), profile(points, fitted)
    assert (whole[0].rows, some[0].rows) == (1500, 500)
    for name in ("E", "alpha", "beta", "a"):
        ends = [(drawn.interval(name), ends[name]) for drawn, ends in (whole, some)]
        for one, other in zip(*ends, strict=True):
            assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.35), name
            assert other.low < getattr(fitted.surface, name) < other.high


def test_memory_does_not_grow_with_the_cells_of_the_seeds() -> None:
    points = large(100_000)
    tracemalloc.start()
    surface.fit(points)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6, "rows x 144 cells x 9 would be 1 GB"


# ---- the minimiser


@pytest.mark.parametrize("delta", [1e-3, 1.0, newton.SQUARES])
def test_derivatives(delta: float) -> None:
    problem, rng = grid(noise=0.01).problem, np.random.default_rng(0)
    theta = np.array([[0.1, 0.2, 0.5, 0.3, 0.35]]) + 0.1 * rng.standard_normal((4, 5))
    weights = rng.integers(0, 3, (4, 64)).astype(float)
    here, step = newton.evaluate(problem, theta, weights, delta), 1e-6
    for i in range(5):
        ahead, behind = (newton.evaluate(problem, theta + side * step * np.eye(5)[i], weights, delta) for side in (1, -1))
        np.testing.assert_allclose((ahead.value - behind.value) / (2 * step), here.gradient[:, i], rtol=1e-5, atol=1e-6)
        slope = (ahead.gradient - behind.gradient) / (2 * step)
        np.testing.assert_allclose(slope, here.hessian[:, i], rtol=1e-4, atol=1e-3)


def test_never_worse_than_a_general_minimiser() -> None:
    """On resamples, against BFGS with the same gradient from the published parameters."""
    points = chinchilla()
    problem, fitted = points.problem, surface.fit(points)
    weights = surface.resamples(len(points), 100, seed=1)
    warm = newton.minimise(problem, np.repeat(fitted.theta[None], 100, 0), weights, fitted.delta)
    x, z = points.centre
    start = np.array([np.log(406.4) - 0.33917 * x, np.log(410.72) - 0.28491 * z, np.log(1.69337), 0.33917, 0.28491])

    def objective(theta: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        point = newton.evaluate(problem, theta[None], weights[None], fitted.delta)
        return point.value[0], point.gradient[0]

    for value, row in zip(warm.value, weights, strict=True):
        assert value <= minimize(objective, start, args=(row,), jac=True, method="BFGS").fun * (1 + 1e-9)


def test_resamples_are_those_of_the_global_generator() -> None:
    np.random.seed(42)  # noqa: NPY002
    drawn = np.random.choice(np.arange(7), 7)  # noqa: NPY002
    assert surface.resamples(7, 1, 42)[0].tolist() == np.bincount(drawn, minlength=7).tolist()


# ---- what it says of itself


def test_a_fit_without_a_minimum_says_so() -> None:
    """The loss does not fall with data at all: B and beta cannot be told."""
    params, tokens = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6)))
    noise = 0.002 * np.random.default_rng(0).standard_normal(36)
    found = surface.fit(
        Points(params, tokens, (1.7 + 400 * params**-0.34) * (1 + 0.1 * np.log(tokens / 1e9)) * np.exp(noise))
    )
    assert not found.proof.converged
    assert str(found.proof).startswith("NOT CONVERGED")


def test_screening_finds_planted_points() -> None:
    clean = grid(noise=0.002)
    loss, params = clean.loss.copy(), clean.params.copy()
    loss[3] *= 1.3
    loss[10] *= 0.8
    points = Points(params, clean.tokens, loss)
    found = screening.screen(points, surface.fit(points))
    assert np.flatnonzero(found.high).tolist() == [3]
    assert np.flatnonzero(found.low).tolist() == [10]
    assert found.undertrained.sum() == (points.tokens < points.params).sum() > 0
    named = {without.what: without for without in screening.sensitivity(points, surface.fit(points))}
    assert named["far above the surface"].dropped == 1
    assert "5 highest" in named


def test_sensitivity_of_the_chinchilla_points() -> None:
    points = chinchilla(drop_highest=0)
    named = {w.what: w.fit for w in screening.sensitivity(points, surface.fit(points))}
    without = named["5 highest"]
    assert without is not None
    assert without.surface.beta == pytest.approx(0.36717, abs=5e-6)


def test_losses_that_are_none() -> None:
    assert screening.why_not(3.0) is None
    for loss, why in (
        (float("nan"), "diverged"),
        (float("inf"), "diverged"),
        (-1.0, "not positive"),
        (40.0, "above a guess"),
        (1e-12, "too small"),
    ):
        assert why in str(screening.why_not(loss))


def test_refusals() -> None:
    points = grid()
    with pytest.raises(ValueError, match="4 points cannot determine 5 parameters"):
        surface.fit(points.where(np.arange(4)))
    surface.fit(points.where(np.array([0, 9, 18, 60])), tied=True)
    with pytest.raises(ValueError, match="all points have one size"):
        surface.fit(points.where(np.flatnonzero(points.params == points.params[0])))
    with pytest.raises(ValueError, match="all points have one loss, 3: the surface cannot be told"):
        surface.fit(Points(points.params, points.tokens, np.full(64, 3.0)))
    with pytest.raises(ValueError, match="delta"):
        surface.fit(points, 0.0)
    with pytest.raises(ValueError, match="loss: values must be finite and positive"):
        Points(points.params, points.tokens, -points.loss)
    with pytest.raises(ValueError, match="tokens: shape"):
        Points(points.params, points.tokens[:3], points.loss)
    with pytest.raises(ValueError, match="cannot drop"):
        screening.highest(points.loss, 64)
