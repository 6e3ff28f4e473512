"""A fitted surface with all that is known of it: intervals, proof, points that pull; as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from madkernels.reporting.tables import Table as Shown
from madkernels.scaling.fits.form import NAMES, Allocation, no_optimum
from madkernels.scaling.fits.isoflop import Optimum, envelope, isoflop, nearest_budgets
from madkernels.scaling.fits.newton import SQUARES
from madkernels.scaling.fits.profile_likelihood import profile
from madkernels.scaling.fits.runs_table import Selection
from madkernels.scaling.fits.screening import LeaveOutFit, Screening, screen, sensitivity
from madkernels.scaling.fits.statistics import Array, Interval, interval
from madkernels.scaling.fits.surface import LAD, SAMPLE, Bootstrap, Fit, bootstrap, fit

LEVEL = 0.95
OBJECTIVES = {LAD: "least absolute deviations", SQUARES: "squares of the loss"}  # others are Huber's


@dataclass(frozen=True)
class Summary:
    """bootstrap is None where no resamples were asked for."""

    selection: Selection
    fit: Fit
    profile: dict[str, Interval]
    bootstrap: Bootstrap | None
    screening: Screening
    without: list[LeaveOutFit]


def summarise(selection: Selection, delta: float, tied: bool, resamples: int, seed: int) -> Summary:
    points = selection.points
    fitted = fit(points, delta, tied=tied)
    drawn = bootstrap(points, fitted, resamples, seed) if resamples else None
    return Summary(
        selection, fitted, profile(points, fitted, LEVEL), drawn, screen(points, fitted), sensitivity(points, fitted)
    )


def as_json(summary: Summary, budgets: Sequence[float]) -> dict[str, Any]:
    """Plain values for JSON; loss in nats per token, sizes in parameters, budgets in FLOPs."""
    found, proof = summary.fit, summary.fit.proof
    return {
        **{name: getattr(found.surface, name) for name in NAMES},
        "points": found.count,
        "dropped": [asdict(dropped) for dropped in summary.selection.dropped],
        "warnings": summary.selection.warnings,
        "objective": found.objective,
        "delta": found.delta if found.delta not in OBJECTIVES else None,
        "loss_function": OBJECTIVES.get(found.delta, "Huber"),
        "tied": found.tied,
        "convergence": {"converged": proof.converged, "positive_definite": proof.curved, **asdict(proof)},
        "intervals": _intervals(summary),
        "sensitivity": [_without(without) for without in summary.without],
        "outlying": {name: _places(summary, name) for name in ("undertrained", "high", "low")},
        "optimum": [asdict(best) for best in optima(found, budgets)],
    }


def optima(found: Fit, budgets: Sequence[float]) -> list[Allocation]:
    """At each budget; NaN where there is none, or the fit has not converged, so that its digits mean nothing."""
    return [found.surface.optimum(flops) if found.proof.converged else no_optimum(flops) for flops in budgets]


def _intervals(summary: Summary) -> dict[str, Any]:
    intervals: dict[str, Any] = {"level": LEVEL, "profile": {name: asdict(found) for name, found in summary.profile.items()}}
    if drawn := summary.bootstrap:
        counts = {
            "resamples": len(drawn.surfaces),
            "rows": drawn.rows,
            "unconverged": drawn.unconverged,
            "better_from_own_seed": drawn.cold,
        }
        intervals["bootstrap"] = counts | {name: asdict(drawn.interval(name, LEVEL)) for name in NAMES}
    return intervals


def _without(without: LeaveOutFit) -> dict[str, Any]:
    row: dict[str, Any] = {"without": without.what, "dropped": without.dropped}
    if without.fit:
        row |= {name: getattr(without.fit.surface, name) for name in NAMES} | {"converged": without.fit.proof.converged}
    return row


def _places(summary: Summary, name: str) -> list[str]:
    flags = getattr(summary.screening, name)
    return [summary.selection.table.place(row) for row in np.flatnonzero(flags).tolist()]


def best_sizes(selection: Selection, approach: int, budget: str | None, shape: str, resamples: int, seed: int) -> Optimum:
    """Approach 1 or 2. budget: a column, or comma-separated numbers, to which runs that lie near belong."""
    if approach == 1:
        return envelope(selection.points, selection.flops)
    if budget is None:
        raise ValueError("approach 2 compares sizes at equal budget: give --budget")
    return isoflop(selection.points, selection.flops, _budgets(selection, budget), shape, resamples, seed)


def _budgets(selection: Selection, budget: str) -> Array:
    if budget not in selection.table.columns:
        try:
            return nearest_budgets(selection.flops, [float(part) for part in budget.split(",")])
        except ValueError:
            pass  # a column that is not there
    return selection.table.numbers(budget)


def laws_as_json(best: Optimum) -> dict[str, Any]:
    return {
        "a": best.size.exponent,
        "b": best.data.exponent,
        "N_opt": asdict(best.size),
        "D_opt": asdict(best.data),
        "intervals": {name: asdict(found) for name, found in best.intervals.items()} | {"unusable": best.unusable},
    }


def best_as_json(best: Optimum, selection: Selection, approach: int, shape: str) -> dict[str, Any]:
    return {
        "approach": approach,
        **({"shape": shape} if approach == 2 else {}),
        **laws_as_json(best),
        "minima": [asdict(b) for b in best.best] if approach == 2 else [],
        "left_out": best.left_out,
        "points": len(selection.points),
        "dropped": [asdict(dropped) for dropped in selection.dropped],
        "warnings": selection.warnings + best.warnings,
    }


def best_table(best: Optimum, approach: int | None, group: str) -> Shown:
    """Minima by budget, or best sizes that were given, without an approach; the power laws are the caption."""
    laws_found = [f"{name} ~ C^{law.exponent:.4f}" for name, law in (("N_opt", best.size), ("D_opt", best.data))]
    spans = [f"{name} {_span(found)} (95 %)" for name, found in best.intervals.items()]
    void = [f"{best.unusable} resamples without two minima"] if best.unusable else []
    caption = "; ".join([*laws_found, *spans, *void, *(f"excluded: {why}" for why in best.left_out)])
    title = f"{f'Approach {approach}' if approach else 'Given best sizes'}{': ' if group else ''}{group}"
    out = Shown(title=title, caption=caption, spare=("FLOPs", "tokens per parameter", "tokens"))
    for name in ("budget", "FLOPs", "parameters", "tokens", "tokens per parameter", *(["loss"] if approach else [])):
        out.add_column(name, justify="right")
    for b in best.best[:: max(len(best.best) // 10, 1)] if approach == 1 else best.best:
        figures = (b.budget, b.flops, b.params, b.tokens, b.tokens / b.params)
        out.add_row(*(f"{value:.3g}" for value in figures), *([f"{b.loss:.4f}"] if approach else []))
    return out


def tables(summary: Summary, group: str, budgets: Sequence[float]) -> list[Shown]:
    title = f"L(N, D) = E + A / N^alpha + B / D^beta{': ' if group else ''}{group}"
    found = [parameter_table(summary, title), sensitivity_table(summary)]
    return [*found, optimum_table(summary, budgets)] if budgets else found


def parameter_table(summary: Summary, title: str) -> Shown:
    """Parameters and their intervals; the proof is the caption."""
    drawn, found = summary.bootstrap, summary.fit
    few = f" Intervals from {SAMPLE:,} of them, brought to the number of all." if found.count > SAMPLE else ""
    spare = ("sd", "profile, 95 %") if drawn else ()
    out = Shown(title=title, caption=f"{found.count:,} points. {found.proof}.{few}", spare=spare)
    out.add_column("")
    for head in ("fit", "profile, 95 %", *(("bootstrap, 95 %", "sd") if drawn else ())):
        out.add_column(head, justify="right")
    for name in NAMES:
        cells = [_figure(getattr(found.surface, name)), _span(summary.profile.get(name))]
        if drawn:
            resampled = drawn.interval(name, LEVEL)
            cells += [_span(resampled), _figure(resampled.sd or 0.0)]
        out.add_row(name, *cells)
    return out


def _figure(value: float) -> str:
    return f"{value:.5g}"


def _span(interval: Interval | None) -> str:
    return "-" if interval is None else f"{_figure(interval.low)} to {_figure(interval.high)}"


def sensitivity_table(summary: Summary) -> Shown:
    out = Shown(title="What the fit would be without some points")
    out.add_column("without")
    for name in ("dropped", *NAMES[:-1]):
        out.add_column(name, justify="right", no_wrap=True)
    for row in summary.without:
        figures = [f"{getattr(row.fit.surface, name):.4g}" if row.fit else "-" for name in NAMES[:-1]]
        note = "" if row.fit is None or row.fit.proof.converged else " (not converged)"
        out.add_row(row.what + note, str(row.dropped), *figures)
    return out


def optimum_table(summary: Summary, budgets: Sequence[float]) -> Shown:
    found, title = summary.fit, "Compute-optimal, C = 6 N D"
    if not found.proof.converged:
        title += ": no optimum, for the fit has not converged"
    elif not (found.surface.alpha > 0 and found.surface.beta > 0):
        title += ": no optimum, for an exponent is not positive"
    out = Shown(title=title, spare=("tokens per parameter", "tokens"))
    for name in (
        "budget",
        "parameters",
        "tokens",
        "tokens per parameter",
        "loss",
        *(("95 %",) if summary.bootstrap else ()),
    ):
        out.add_column(name, justify="right")
    for best in optima(found, budgets):
        if not 0 < best.params < np.inf:
            out.add_row(f"{best.flops:.3g}", *["-"] * (len(out.columns) - 1))
            continue
        figures = (best.flops, best.params, best.tokens, best.tokens / best.params)
        cells = [f"{v:.3g}" for v in figures] + [f"{best.loss:.4f}"]
        if summary.bootstrap:
            losses = summary.bootstrap.losses(best.flops)
            drawn = losses[np.isfinite(losses)]
            within = interval(drawn, LEVEL) if len(drawn) > 1 else None
            cells.append(f"{within.low:.4f} to {within.high:.4f}" if within else "-")
        out.add_row(*cells)
    return out
