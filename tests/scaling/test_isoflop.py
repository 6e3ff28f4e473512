"""Best sizes by budget: known biases, published figures, minima that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scaling_points import CHINCHILLA, SURFACE, chinchilla
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.scaling.fits import isoflop
from madkernels.scaling.fits.form import Points

NOMINAL = np.array([6, 10, 30, 60, 100, 300, 600, 1000, 3000]) * 1e18


def around_the_best(factor: float, shift: float = 1.0, noise: float = 0.0) -> tuple[Points, np.ndarray]:
    """15 sizes within a factor of the best one, at 5 budgets; `shift` moves them all."""
    budgets = np.repeat(np.geomspace(1e17, 1e21, 5), 15)
    best = np.array([SURFACE.optimum(budget).params for budget in budgets])
    params = shift * best * np.tile(np.geomspace(1 / factor, factor, 15), 5)
    tokens = budgets / 6 / params
    factors = np.exp(noise * np.random.default_rng(0).standard_normal(75))
    return Points(params, tokens, SURFACE.loss(params, tokens) * factors), budgets


@pytest.mark.parametrize(
    ("shape", "errors"),
    [("parabola", (-0.327, -1.301, -2.903, -5.100)), ("cubic", (0.001, 0.010, 0.052, 0.164))],
)
def test_published_bias_without_noise(shape: str, errors: tuple[float, ...]) -> None:
    """Of the best tokens extrapolated to 1e24, in percent; the exponent is exact."""
    for factor, error in zip((2, 4, 8, 16), errors, strict=True):
        points, budgets = around_the_best(factor)
        found = isoflop.isoflop(points, budgets, budgets, shape)
        assert 100 * (found.data.at(1e24) / SURFACE.optimum(1e24).tokens - 1) == pytest.approx(error, abs=5.1e-4)
        assert (found.size.exponent, found.data.exponent) == pytest.approx((SURFACE.a, SURFACE.b), abs=1e-9)


def test_akima_finds_the_minimum_between_points() -> None:
    points, budgets = around_the_best(4)
    found = isoflop.isoflop(points, budgets, budgets, "akima")
    assert found.data.at(1e24) / SURFACE.optimum(1e24).tokens == pytest.approx(1, abs=5e-3)


def test_chinchilla_points() -> None:
    """Published by approach 2: a = 0.49 (0.462, 0.534); from these digitised points 0.496."""
    points = chinchilla()
    flops = 6 * points.params * points.tokens
    budgets = isoflop.nearest_budgets(flops, list(NOMINAL))
    assert [int((budgets == nominal).sum()) for nominal in NOMINAL] == [15, 24, 23, 18, 20, 16, 15, 18, 11]
    found = isoflop.isoflop(points, flops, budgets, resamples=500)
    assert (found.size.exponent, found.data.exponent) == pytest.approx((0.4959, 0.5041), abs=2e-4)
    assert found.size.at(5.76e23) == pytest.approx(66.5e9, rel=2e-3)
    assert found.data.at(5.76e23) / found.size.at(5.76e23) == pytest.approx(21.7, rel=5e-3)
    assert found.intervals["a"].low < 0.49 < found.intervals["a"].high
    assert found.left_out == ["80 runs are near no budget"]


def test_minima_at_the_edge_are_dropped_and_told() -> None:
    points, budgets = around_the_best(3)
    moved = np.where(budgets > 5e20, points.params * 20, points.params)
    tokens = budgets / 6 / moved
    found = isoflop.isoflop(Points(moved, tokens, SURFACE.loss(moved, tokens)), budgets, budgets)
    assert [b.budget for b in found.best] == pytest.approx(list(np.geomspace(1e17, 1e20, 4)))
    assert found.left_out[0].startswith("budget 1e+21: the least loss is at the edge of the sizes")
    assert found.size.exponent == pytest.approx(SURFACE.a)
    points, budgets = around_the_best(3, shift=20)
    with pytest.raises(ValueError, match=r"fewer than two budgets have a minimum.*edge of the sizes"):
        isoflop.isoflop(points, budgets, budgets)


def test_a_curve_that_bends_down_has_no_minimum() -> None:
    x = np.linspace(0, 1, 7)
    for shape in ("parabola", "cubic"):
        at, _ = isoflop.minima(x, -((x - 0.5) ** 2)[:, None], shape)
        assert np.isnan(at).all()


def test_intervals_hold_the_truth() -> None:
    points, budgets = around_the_best(4, noise=0.002)
    found = isoflop.isoflop(points, budgets, budgets, "cubic", resamples=400)
    assert found.intervals["a"].low < SURFACE.a < found.intervals["a"].high
    assert found.intervals["a"].high - found.intervals["a"].low < 0.1
    assert found.unusable == 0


def test_too_few_sizes() -> None:
    points, budgets = around_the_best(4)
    few = np.flatnonzero((budgets > 5e20) | (np.arange(75) % 5 == 0))
    found = isoflop.isoflop(points.where(few), budgets[few], budgets[few])
    assert not found.left_out
    with pytest.raises(ValueError, match="3 sizes; the cubic takes 4"):
        isoflop.isoflop(points.where(few), budgets[few], budgets[few], "cubic")
    with pytest.raises(ValueError, match="shape: 'line' is not known"):
        isoflop.isoflop(points, budgets, budgets, "line")


def test_a_minimum_below_every_run_is_told() -> None:
    points, budgets = around_the_best(4, noise=0.002)
    assert not isoflop.isoflop(points, budgets, budgets).warnings
    loss = points.loss.copy()
    loss[14] = 10  # the largest size of the first budget
    found = isoflop.isoflop(Points(points.params, points.tokens, loss), budgets, budgets)
    (warning,) = found.warnings
    assert warning.startswith("budget 1e+17: the curve's minimum, ")
    assert f"lies below every run of it, the lowest of which is {loss[:15].min():.4g}" in warning


def test_draws_of_many_runs_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    points, budgets = around_the_best(4, noise=0.002)
    whole = isoflop.isoflop(points, budgets, budgets, resamples=300)
    monkeypatch.setattr(isoflop, "DRAWN", 15 * 50)
    parts = isoflop.isoflop(points, budgets, budgets, resamples=300)
    assert parts.unusable == whole.unusable
    for name in "ab":
        assert parts.intervals[name].sd == pytest.approx(whole.intervals[name].sd, rel=0.2)


def test_as_many_budgets_or_sizes_as_runs() -> None:
    """Neither takes time or memory of their square."""
    rng = np.random.default_rng(0)
    params, tokens = 10 ** rng.uniform(7, 10, 20_000), 10 ** rng.uniform(9, 12, 20_000)
    points, flops = Points(params, tokens, SURFACE.loss(params, tokens)), 6 * params * tokens
    curves, left_out = isoflop.curves_of(points, flops, flops, "parabola")
    assert (curves, len(left_out)) == ([], 20_000)
    with pytest.raises(ValueError, match="fewer than two sizes"):
        isoflop.envelope(points, flops)


def test_envelope_of_training_curves() -> None:
    """On the surface itself: every size trained from 1e17 to 1e21 FLOPs."""
    params, flops = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 1e11, 60), np.geomspace(1e17, 1e21, 60)))
    tokens = flops / 6 / params
    found = isoflop.envelope(Points(params, tokens, SURFACE.loss(params, tokens)), flops)
    assert (found.size.exponent, found.data.exponent) == pytest.approx((SURFACE.a, SURFACE.b), abs=2e-3)
    one = params == params[0]
    with pytest.raises(ValueError, match="fewer than two sizes"):
        isoflop.envelope(Points(params[one], tokens[one], SURFACE.loss(params[one], tokens[one])), flops[one])


def test_command(tmp_path: Path) -> None:
    points, budgets = around_the_best(4)
    lines = [f"{n},{d},{c},{y}" for n, d, c, y in zip(points.params, points.tokens, budgets, points.loss, strict=True)]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(["N,D,budget,L", *lines]))
    common = ["scale", "fit", str(path), "--params", "N", "--tokens", "D", "--loss", "L", "--approach"]
    result = CliRunner().invoke(
        app, [*common, "2", "--budget", "budget", "--shape", "cubic", "--bootstrap", "50", "--json", "-"]
    )
    found = json.loads(result.stdout)
    assert found["a"] == pytest.approx(SURFACE.a)
    assert len(found["minima"]) == 5
    result = CliRunner().invoke(app, [*common, "2", "--budget", "1e17,1e18,1e19,1e20,1e21"], env={"COLUMNS": "150"})
    assert "N_opt ~ C^0.4516" in result.output
    assert "give --budget" in str(CliRunner().invoke(app, [*common, "2"]).exception)
    assert "no column 'nominal'" in str(CliRunner().invoke(app, [*common, "2", "--budget", "nominal"]).exception)
    curves = CliRunner().invoke(app, [*common, "1", "--json", "-"])
    assert json.loads(curves.stdout)["approach"] == 1


def test_command_on_the_chinchilla_points() -> None:
    if not CHINCHILLA.exists():
        pytest.skip(f"no {CHINCHILLA}")
    columns = ["--params", "Model Size", "--flops", "Training FLOP", "--loss", "loss", "--drop-highest", "5"]
    budgets = ["--approach", "2", "--budget", ",".join(map(str, NOMINAL)), "--json", "-"]
    found = json.loads(CliRunner().invoke(app, ["scale", "fit", str(CHINCHILLA), *columns, *budgets]).stdout)
    assert found["a"] == pytest.approx(0.4959, abs=2e-4)


# ---- best sizes that are given


def test_a_line_through_given_sizes(tmp_path: Path) -> None:
    """The standard error of a slope by hand: sqrt(sum r^2 / (n - 2) / sum (x - mean)^2), and t of two degrees, 4.302653."""
    x, noise = np.arange(4.0), np.array([0.1, -0.1, -0.1, 0.1])
    rows = [f"{10.0 ** (18 + i)},{3.0 * 10.0 ** (0.5 * i + float(noise[i]))}" for i in range(4)]
    file = tmp_path / "optima.csv"
    file.write_text("\n".join(["flops,params", *reversed(rows)]) + "\n")
    done = CliRunner().invoke(app, ["scale", "line", str(file), "--json", "-"], catch_exceptions=False)
    found = json.loads(done.output)
    reach = 4.302653 * np.sqrt((noise**2).sum() / 2 / ((x - x.mean()) ** 2).sum())
    assert (found["a"], found["b"]) == pytest.approx((0.5, 0.5))
    assert [found["intervals"]["a"][end] for end in ("low", "high")] == pytest.approx([0.5 - reach, 0.5 + reach], rel=1e-6)
    assert np.exp(found["N_opt"]["offset"]) * 1e18**0.5 == pytest.approx(3.0)
    shown = CliRunner().invoke(app, ["scale", "line", str(file)]).output
    assert "N_opt ~ C^0.5000" in shown
    assert "nan" not in shown


def test_lines_that_nothing_determines(tmp_path: Path) -> None:
    file = tmp_path / "optima.csv"
    for text, message in (
        ("flops,params\n1e18,3\n1e18,4\n", "2 best sizes at one budget; a line takes two budgets"),
        ("loss,params\n1e18,3\n", "give --flops or --tokens; columns: loss, params"),
        ("flops,params\n1e18,-3\n", "params is -3; expected a positive number"),
    ):
        file.write_text(text)
        done = CliRunner().invoke(app, ["scale", "line", str(file)])
        assert message in str(done.exception)
    file.write_text("flops,tokens,params\n1e18,1e9,3\n1e20,1e10,4\n")
    found = json.loads(CliRunner().invoke(app, ["scale", "line", str(file), "--json", "-"]).output)
    assert found["b"] == pytest.approx(0.5)
    assert "a" not in found["intervals"], "two points leave no residual"
