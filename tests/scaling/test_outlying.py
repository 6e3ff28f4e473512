"""Losses that do not belong: found wherever they are planted, and never where nothing is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scaling_points import SURFACE, chinchilla

from madkernels.scaling.fits.form import Points
from madkernels.scaling.fits.outlying import outlying, spikes
from madkernels.scaling.fits.runs_table import Columns, by_group, of_kind, read_table, select

STUDY = Path(__file__).parents[2] / "docs" / "studies" / "scaling-small" / "runs.csv"


def flagged(points: Points) -> list[int]:
    return np.flatnonzero(outlying(points).flags).tolist()


def planted(points: Points, row: int, loss: float) -> Points:
    return Points(points.params, points.tokens, np.where(np.arange(len(points)) == row, loss, points.loss))


def isoflop(budgets: int, sizes: int, within: float, noise: float, seed: int = 0) -> Points:
    compute = np.repeat(np.geomspace(1e18, 1e20, budgets), sizes)
    best = np.array([SURFACE.optimum(c).params for c in compute])
    params = best * np.tile(np.geomspace(1 / within, within, sizes), budgets)
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(params)))
    return Points(params, compute / 6 / params, SURFACE.loss(params, compute / 6 / params) * factor)


def curves(noise: float) -> Points:
    params, tokens = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 1e9, 8), np.geomspace(1e6, 1e11, 40), indexing="ij"))
    factor = np.exp(noise * np.random.default_rng(0).standard_normal(len(params)))
    return Points(params, tokens, np.minimum(SURFACE.loss(params, tokens), 11) * factor)


# ---- no false alarm


@pytest.mark.parametrize("drop_highest", [0, 5])
def test_none_of_the_chinchilla_points(drop_highest: int) -> None:
    points = chinchilla(drop_highest)
    assert not flagged(points)
    assert not spikes(points).flags.any()


def test_none_of_the_study() -> None:
    """Of each architecture and of each budget by itself, ladders with and without."""
    runs, columns = read_table(STUDY), Columns("params", "loss", "tokens", "flops")
    for table in (runs, of_kind(runs, "isoflop")):
        for _, part in by_group(table, "architecture"):
            selection = select(part, columns)
            budgets = selection.table.numbers("budget")
            assert not selection.warnings
            assert not flagged(selection.points)
            assert not any(flagged(selection.points.where(budgets == budget)) for budget in np.unique(budgets))


@pytest.mark.parametrize("noise", [0.002, 0.02])
@pytest.mark.parametrize("within", [4, 16])
@pytest.mark.parametrize(("budgets", "sizes"), [(3, 5), (2, 4), (1, 5), (2, 3)])
def test_a_run_of_ten_is_found_wherever_it_is(budgets: int, sizes: int, within: float, noise: float) -> None:
    clean = isoflop(budgets, sizes, within, noise)
    assert not flagged(clean)
    assert [flagged(planted(clean, row, 10)) for row in range(len(clean))] == [[row] for row in range(len(clean))]


# ---- what is found


def test_every_run_of_the_study_that_diverges() -> None:
    for _, part in by_group(of_kind(read_table(STUDY), "isoflop"), "architecture"):
        points = select(part, Columns("params", "loss", "tokens", "flops")).points
        assert [flagged(planted(points, row, 10)) for row in range(len(points))] == [[row] for row in range(len(points))]


def test_losses_far_below_and_what_was_expected() -> None:
    points = isoflop(3, 5, 4, 0.002)
    found = outlying(planted(points, 7, 1.0))
    assert np.flatnonzero(found.flags).tolist() == [7]
    assert found.expected[7] == pytest.approx(points.loss[7], rel=0.02)


def test_several_at_once() -> None:
    points = isoflop(3, 5, 4, 0.002)
    assert flagged(planted(planted(planted(points, 4, 10), 9, 6), 10, 9)) == [4, 9, 10]


def test_few_runs() -> None:
    points = isoflop(1, 3, 4, 0)
    assert flagged(points) == []
    four = Points(np.array([1e8, 2e8, 4e8, 8e8]), np.array([8e9, 4e9, 2e9, 1e9]), np.array([2.7, 2.69, 2.75, 10]))
    assert flagged(four) == [3]


@pytest.mark.parametrize("noise", [0, 0.001, 0.02])
def test_training_curves(noise: float) -> None:
    """They fall steeply at first, which is no fault; what rises again, or drops for a moment, is one."""
    clean = curves(noise)
    assert not spikes(clean).flags.any()
    wrong = planted(planted(planted(clean, 100, 2 * clean.loss[100]), 227, clean.loss[227] / 2), 319, 10)
    found = spikes(wrong)
    assert np.flatnonzero(found.flags).tolist() == [100, 227, 319]
    assert found.expected[[100, 227, 319]] == pytest.approx(clean.loss[[100, 227, 319]], rel=0.2)


def test_one_point_a_size_is_no_training_curve() -> None:
    points = isoflop(3, 5, 4, 0.002)
    assert np.flatnonzero(spikes(planted(points, 8, 10)).flags).tolist() == [8]
