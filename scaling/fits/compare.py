"""Architectures against one another on IsoFLOP runs: exponent, least loss at each budget, and where two of them cross.

The least loss at a budget is the minimum of its curve over sizes. Between budgets ln L is taken as a straight line in ln C,
so two architectures cross where the line through the differences of ln L passes zero; a crossing outside of the budgets that
both have is none. Intervals are percentiles of differences between refits to curves with noise added, each architecture for
itself: they hold the scatter about the curves, not what another seed of all runs together would change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from madkernels.reporting.tables import Table as Shown
from madkernels.scaling.fits.form import Points
from madkernels.scaling.fits.isoflop import Best, Curve, below_all, curves_of, draw_minima, exponents, line, lowest
from madkernels.scaling.fits.outlying import outlying, tell
from madkernels.scaling.fits.runs_table import Columns, Cut, Dropped, Table, by_group, of_kind, select
from madkernels.scaling.fits.statistics import Array, Interval, interval


@dataclass(frozen=True)
class Frontier:
    """The least loss of an architecture at each of its budgets, with draws for intervals.

    curves, best: by budget; a minimum at the edge of the sizes is the lowest run. a: exponent of the best size, NaN where
    fewer than two minima are inside. losses: (draws, budgets). exponents: (draws,), NaN as a. left_out: budgets, and why.
    warnings: rows and minima that look wrong.
    """

    curves: list[Curve]
    best: list[Best]
    a: float
    losses: Array
    exponents: Array
    left_out: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def budgets(self) -> list[float]:
        return [b.budget for b in self.best]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; None where it cannot be drawn."""

    value: float
    interval: Interval | None

    @property
    def told_apart(self) -> bool:
        """Whether zero is outside of the interval."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


@dataclass(frozen=True)
class Crossing:
    """FLOPs at which two are equal, None if not within the budgets of both; and the part of draws that cross there."""

    flops: Estimate | None
    share: float


@dataclass(frozen=True)
class Difference:
    """An architecture against the base: in the exponent a, in nats at each budget that both have, and where they cross."""

    architecture: str
    base: str
    exponent: Estimate | None
    losses: dict[float, Estimate]
    crossing: Crossing | None


@dataclass(frozen=True)
class BootstrapOptions:
    """How curves are laid through losses, and how often with noise added."""

    shape: str = "parabola"
    resamples: int = 1000
    seed: int = 42


def frontiers(
    table: Table, columns: Columns, group: str, budget: str, how: BootstrapOptions, cut: Cut | None = None
) -> tuple[dict[str, Frontier], list[Dropped]]:
    """A frontier for each value of the column `group`, from its rows of kind isoflop; and what was dropped.

    Dropped are rows, and architectures of which nothing can be told. ValueError where those are all.
    """
    for name in (group, columns.params, columns.loss, budget, *filter(None, (columns.tokens, columns.flops))):
        table.column(name)
    found, dropped, failed = {}, [], []
    for i, (name, rows) in enumerate(by_group(of_kind(table, "isoflop"), group)):
        try:
            selection = select(rows, columns, cut)
            selection = tell(selection, outlying(selection.points))
            curves = selection.table.numbers(budget)
            made = frontier(selection.points, selection.flops, curves, replace(how, seed=how.seed + i))
        except ValueError as error:
            failed.append(Dropped(name, str(error)))
            continue
        found[name] = replace(made, warnings=selection.warnings + made.warnings)
        dropped += selection.dropped
    if not found:
        raise ValueError("; ".join(f"{f.place}: {f.why}" for f in failed) or "there are no IsoFLOP runs")
    return found, dropped + failed


def frontier(points: Points, flops: Array, budgets: Array, how: BootstrapOptions) -> Frontier:
    """The frontier of one architecture's runs, each (n,). ValueError where no budget has enough sizes."""
    curves, left_out = curves_of(points, flops, budgets, how.shape)
    if not curves:
        raise ValueError("; ".join(["no budget has enough sizes", *left_out]))
    best = [lowest(curve, how.shape) for curve in curves]
    inside = [b for b in best if not b.edge]
    left_out += [f"budget {b.budget:.3g}: the least loss is at the edge of the sizes" for b in best if b.edge]
    a = float("nan")
    if len(inside) > 1:
        a = line(np.log([b.flops for b in inside]), np.log([b.params for b in inside])).exponent
    drawn = draw_minima(curves, how.shape, how.resamples, np.random.default_rng(how.seed))
    slopes = exponents(curves, drawn)[:, 0] if how.resamples else np.empty(0)
    return Frontier(curves, best, a, drawn[:, :, 2], slopes, left_out, below_all(curves, best))


def compare(frontiers: Mapping[str, Frontier]) -> list[Difference]:
    """Each but the first to the first. ValueError where there is only one."""
    if len(frontiers) < 2:
        raise ValueError(f"comparing takes two architectures at least; there is {', '.join(frontiers) or 'none'}")
    base, *others = frontiers
    return [_difference(base, name, frontiers[base], frontiers[name]) for name in others]


def _difference(base: str, name: str, one: Frontier, other: Frontier) -> Difference:
    shared = sorted(set(one.budgets) & set(other.budgets))
    columns = [(one.budgets.index(budget), other.budgets.index(budget)) for budget in shared]
    losses = {
        budget: _estimate(other.best[j].loss - one.best[i].loss, other.losses[:, j] - one.losses[:, i])
        for budget, (i, j) in zip(shared, columns, strict=True)
    }
    exponent = None
    if np.isfinite(one.a) and np.isfinite(other.a):
        exponent = _estimate(other.a - one.a, other.exponents - one.exponents)
    crossing = _crossing(one, other, columns) if len(shared) > 1 else None
    return Difference(name, base, exponent, losses, crossing)


def _estimate(value: float, draws: Array) -> Estimate:
    usable = draws[np.isfinite(draws)]
    return Estimate(value, interval(usable) if len(usable) > 1 else None)


def _crossing(one: Frontier, other: Frontier, columns: list[tuple[int, int]]) -> Crossing:
    first, second = (list(side) for side in zip(*columns, strict=True))
    compute = np.log([one.best[i].flops for i in first])
    gaps = np.log([other.best[j].loss for j in second]) - np.log([one.best[i].loss for i in first])
    with np.errstate(invalid="ignore", divide="ignore"):  # so much noise that a draw is no loss
        drawn = _roots(compute, np.log(other.losses[:, second]) - np.log(one.losses[:, first]))
    there = _roots(compute, gaps[None])[0]
    crossing = drawn[np.isfinite(drawn)]
    share = len(crossing) / len(drawn) if len(drawn) else float("nan")
    return Crossing(_estimate(float(np.exp(there)), np.exp(crossing)) if np.isfinite(there) else None, share)


def _roots(compute: Array, gaps: Array) -> Array:
    """ln C at which the line through each row of gaps (rows, budgets) is zero; NaN outside of the budgets."""
    usable = np.isfinite(gaps).all(1)
    offset, slope = np.polynomial.polynomial.polyfit(compute, np.where(usable, gaps.T, 0), 1)
    roots = -offset / np.where(slope == 0, np.inf, slope)
    inside = usable & (slope != 0) & (roots >= compute.min()) & (roots <= compute.max())
    return np.where(inside, roots, np.nan)


def frontier_table(by_name: Mapping[str, Frontier]) -> Shown:
    """The best size, its tokens and its loss, by architecture and budget, and the exponent a of each architecture."""
    told = "edge: the smallest or the largest size, so only a bound. a: best size ~ C^a."
    out = Shown(title="Least loss at each budget", caption=told, spare=("a, 95 %", "tokens"))
    out.add_column("architecture", no_wrap=True)
    for name in ("budget", "loss", "", "parameters", "tokens", "a", "a, 95 %"):
        out.add_column(name, justify="right")
    for name, found in by_name.items():
        exponent = _exponent_texts(found)
        for b in found.best:
            figures = (f"{value:.3g}" for value in (b.params, b.tokens))
            out.add_row(name, f"{b.budget:.3g}", f"{b.loss:.4f}", "edge" if b.edge else "", *figures, *exponent)
            exponent = ("", "")
        out.add_section()
    return out


def _exponent_texts(found: Frontier) -> tuple[str, str]:
    if not np.isfinite(found.a):
        return "-", "-"
    within = _estimate(found.a, found.exponents).interval
    return f"{found.a:.3f}", f"{within.low:.3f} to {within.high:.3f}" if within else "-"


def difference_table(differences: list[Difference]) -> Shown:
    """One column per architecture; ! where zero is outside of the interval."""
    out = Shown(
        title=f"Difference to {differences[0].base}", caption="95 % intervals; ! zero is outside. Losses in nats per token."
    )
    out.add_column("", no_wrap=True)
    for found in differences:
        out.add_column(found.architecture, justify="right", min_width=20)  # an interval on one line
    out.add_row("exponent a of the best size", *(estimate_text(found.exponent) for found in differences))
    for budget in sorted({budget for found in differences for budget in found.losses}):
        out.add_row(f"loss at {budget:.3g}", *(estimate_text(found.losses.get(budget)) for found in differences))
    out.add_row("crosses at", *(crossing_text(found.crossing) for found in differences))
    return out


def estimate_text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    within = estimate.interval
    span = f" ({within.low:+.4f} to {within.high:+.4f})" if within else ""
    return f"{estimate.value:+.4f}{span}{' !' if estimate.told_apart else ''}"


def crossing_text(crossing: Crossing | None) -> str:
    if crossing is None:
        return "-"
    part = f"; {100 * crossing.share:.0f} % of draws do" if np.isfinite(crossing.share) else ""
    if crossing.flops is None:
        return f"not within the budgets{part}"
    within = crossing.flops.interval
    return f"{crossing.flops.value:.3g}{f' ({within.low:.3g} to {within.high:.3g})' if within else ''}{part}"
