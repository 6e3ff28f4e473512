"""A report of scaling runs as one HTML page: best sizes, losses at budgets, the surface, state, overtraining, MAD scores.

What is missing or cannot be trusted stands first: failed runs, minima at the edge of the sizes, fits that did not converge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from madkernels import pages
from madkernels.models.spec import SpecError
from madkernels.scaling import laws
from madkernels.scaling.compare import BootstrapOptions, Frontier, compare, crossing_text, estimate_text, frontiers
from madkernels.scaling.correlate import COEFFICIENTS, FEW, coefficient_text, correlate, labels_of, losses_at, read_scores
from madkernels.scaling.isoflop import through
from madkernels.scaling.laws import Bootstrap, Fit, interval
from madkernels.scaling.state import attention_share, hybrid_ratio, overtrained, state_law
from madkernels.scaling.table import Columns, Cut, Selection, Table, by_group, kinds_of, select, shortened

RESAMPLES = 500  # of each surface
TOLD_GAPS = 100


@dataclass
class Report:
    """What all sections draw on; `gaps` collects what is missing as they are made."""

    table: Table
    columns: Columns
    group: str
    budget: str
    how: BootstrapOptions
    cut: Cut | None
    frontiers: dict[str, Frontier]
    colours: dict[str, str]
    gaps: list[str] = field(default_factory=list)


def page(
    table: Table,
    scores: Table | None,
    columns: Columns,
    group: str,
    budget: str,
    how: BootstrapOptions,
    title: str,
    cut: Cut | None = None,
) -> str:
    """Rows of `madkernels scale run`; sections for which there are no rows are skipped. ValueError without IsoFLOP rows."""
    found, dropped = frontiers(table, columns, group, budget, how, cut)
    names = dict.fromkeys([*found, *table.column(group)])  # those without IsoFLOP runs too
    colours = dict(zip(names, cycle(pages.COLOURS), strict=False))
    gaps = [f"{row.place}: {row.why}" for row in dropped]
    gaps += [f"{name}: {why}" for name, f in found.items() for why in f.left_out + f.warnings]
    report = Report(table, columns, group, budget, how, cut, found, colours, gaps)
    sections = [_isoflop(report), _best_sizes(report), _losses(report), _surfaces(report)]
    sections += [_states(report), _overtrained(report), _hybrids(report)]
    sections += [_scores(report, scores)] if scores else []
    budgets = sorted({b for f in found.values() for b in f.budgets})
    facts = f"{len(table)} runs of {len(found)} architectures; budgets {', '.join(f'{b:.3g}' for b in budgets)} FLOPs."
    head = f"<h1>{pages.text(title)}</h1>{pages.note(facts)}"
    return pages.document(title, [head, pages.gaps(shortened(report.gaps, TOLD_GAPS)), *sections])


def _named(report: Report, name: str) -> str:
    return pages.swatch(name, report.colours[name])


def _section(title: str, *parts: str) -> str:
    return f"<h2>{pages.text(title)}</h2>" + "".join(parts)


# ---- IsoFLOP runs


def _isoflop(report: Report) -> str:
    count = len(report.frontiers)
    figure = Figure(figsize=(min(3.6 * count, 11), 3.2), layout="constrained")
    for axes, (name, found) in zip(
        figure.subplots(1, count, squeeze=False, sharey=True)[0], report.frontiers.items(), strict=True
    ):
        _draw_curves(axes, found, report.how.shape)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("parameters")
    figure.axes[0].set_ylabel("loss, nats per token")
    return _section(
        "Loss against size at each budget", pages.figure(figure, f"One {report.how.shape} per budget; stars are minima.")
    )


def _draw_curves(axes: Axes, found: Frontier, shape: str) -> None:
    for curve, best, colour in zip(found.curves, found.best, cycle(pages.COLOURS)):
        fine = np.linspace(curve.x[0], curve.x[-1], 200)
        axes.plot(np.exp(curve.x), curve.y, "o", ms=4, color=colour, label=f"{curve.budget:.2g}")
        axes.plot(np.exp(fine), through(curve, shape)(fine), color=colour, lw=1)
        if not best.edge:
            axes.plot(best.params, best.loss, "*", ms=10, color=colour)
    axes.set_xscale("log")
    axes.legend(fontsize=7, frameon=False)
    pages.finish(axes)


def _best_sizes(report: Report) -> str:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("params", "tokens"), strict=True):
        for name, found in report.frontiers.items():
            inside = [b for b in found.best if not b.edge]
            axes.loglog([b.flops for b in inside], [getattr(b, what) for b in inside], "o-", color=report.colours[name])
        axes.set_xlabel("training FLOPs")
        axes.set_ylabel({"params": "best size, parameters", "tokens": "best number of tokens"}[what])
        pages.finish(axes)
    lines = [[_named(report, name), _exponent(found)] for name, found in report.frontiers.items()]
    table = pages.table(["", "a, N_opt ~ C^a"], lines)
    return _section("Best size", pages.figure(figure, "Size and tokens of least loss, minima at an edge excluded."), table)


def _exponent(found: Frontier) -> str:
    usable = found.exponents[np.isfinite(found.exponents)]
    if not np.isfinite(found.a):
        return "-"
    within = interval(usable) if len(usable) > 1 else None
    return f"{found.a:.3f}" + (f" ({within.low:.3f} to {within.high:.3f})" if within else "")


def _losses(report: Report) -> str:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, found in report.frontiers.items():
        middle = np.array([b.loss for b in found.best])
        low, high = np.percentile(found.losses, [2.5, 97.5], axis=0) if len(found.losses) else (middle, middle)
        errors = np.maximum([middle - low, high - middle], 0)
        flops = [b.flops for b in found.best]
        axes.errorbar(flops, middle, yerr=errors, marker="o", ms=4, capsize=3, color=report.colours[name], label=name)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("least loss, nats per token")
    axes.legend(fontsize=8, frameon=False)
    pages.finish(axes)
    drawn = pages.figure(figure, "Least loss at each budget, with 95 % intervals.")
    return _section("Loss at a budget", drawn, _differences(report) if len(report.frontiers) > 1 else "")


def _differences(report: Report) -> str:
    found = compare(report.frontiers)
    budgets = sorted({budget for difference in found for budget in difference.losses})
    lines = [
        [
            _named(report, d.architecture),
            estimate_text(d.exponent),
            *(estimate_text(d.losses.get(budget)) for budget in budgets),
            crossing_text(d.crossing),
        ]
        for d in found
    ]
    head = ["", "a", *(f"loss at {budget:.3g}" for budget in budgets), "crosses at"]
    told = f"Differences to {found[0].base}, in nats; ! zero is outside of the 95 % interval."
    return pages.table(head, lines) + pages.note(told)


# ---- the surface


def _surfaces(report: Report) -> str:
    """The surface of each architecture, through all runs but those that change the state."""
    lines, drawn = [], []
    for name, selection in _selections(report, lambda kind: kind != "state").items():
        try:
            fit = laws.fit(selection.points)
        except ValueError as error:
            report.gaps.append(f"{name}: no surface: {error}")
            continue
        if not fit.proof.converged:
            report.gaps.append(f"{name}: the surface is not to be trusted: {fit.proof}")
        else:
            drawn.append((name, selection, fit))
        resampled = laws.bootstrap(selection.points, fit, RESAMPLES)
        if resampled.unconverged:
            report.gaps.append(f"{name}: {resampled.unconverged} of {RESAMPLES} resamples of the surface did not converge")
        lines.append([_named(report, name), *_parameters(fit, resampled)])
    if not lines:
        return ""
    table = pages.table(["", "points", *laws.NAMES[:-1], "a, 95 %", "seeds at the minimum", "gradient"], lines)
    return _section("The surface L(N, D) = E + A / N^alpha + B / D^beta", _contours(drawn) if drawn else "", table)


def _parameters(fit: Fit, resampled: Bootstrap) -> list[str]:
    within, proof = resampled.interval("a"), fit.proof
    return [
        str(fit.count),
        *(f"{getattr(fit.surface, name):.4g}" for name in laws.NAMES[:-1]),
        f"{within.low:.3f} to {within.high:.3f}",
        f"{proof.agreeing} of {proof.seeds}",
        f"{proof.gradient_norm:.1e}",
    ]


def _contours(drawn: list[tuple[str, Selection, Fit]]) -> str:
    figure = Figure(figsize=(min(3.8 * len(drawn), 11), 3.4), layout="constrained")
    for axes, (name, selection, fit) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        points = selection.points
        flops = laws.FLOPS * points.params * points.tokens
        across = np.geomspace(flops.min() / 2, flops.max() * 2, 80)
        sizes = np.geomspace(points.params.min() / 2, points.params.max() * 2, 80)
        c, n = np.meshgrid(across, sizes)
        lines = axes.contour(c, n, fit.surface.loss(n, c / laws.FLOPS / n), levels=12, cmap="viridis", linewidths=0.8)
        axes.clabel(lines, fontsize=6)
        axes.plot(flops, points.params, "k.", ms=3)
        axes.plot(across, [fit.surface.optimum(budget).params for budget in across], color=pages.COLOURS[1], lw=2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(sizes[0], sizes[-1])
        axes.set_xlabel("FLOPs, 6 N D")
        axes.set_title(name, fontsize=10)
    figure.axes[0].set_ylabel("parameters")
    return pages.figure(figure, "Fitted loss, the runs, and the efficient frontier.")


def _selections(report: Report, wanted: Callable[[str], bool]) -> dict[str, Selection]:
    """The rows of the wanted kinds, by architecture; all rows where there is no column `kind`."""
    rows = report.table.where(np.array([wanted(kind) for kind in kinds_of(report.table)], dtype=bool))
    found = {}
    for name, part in by_group(rows, report.group):
        try:
            found[name] = select(part, report.columns, report.cut)
        except ValueError as error:
            report.gaps.append(f"{name}: {error}")
    return found


# ---- what else a run can change


def _states(report: Report) -> str:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes, lines = figure.subplots(), []
    for name, selection in _selections(report, lambda kind: kind == "state").items():
        state, loss = selection.table.numbers("state"), selection.points.loss
        axes.loglog(state, np.exp(loss), "o", color=report.colours[name])
        try:
            found = state_law(state, loss)
        except ValueError as error:
            report.gaps.append(f"{name}: {error}")
            continue
        axes.loglog(state, [found.law.at(m) for m in state], color=report.colours[name])
        span = f"{found.interval.low:.3f} to {found.interval.high:.3f}" if found.interval else "too few runs"
        lines.append([pages.text(name), str(found.count), f"{found.law.exponent:.3f}", span])
    if not lines:
        return ""
    axes.set_xlabel("total state, elements")
    axes.set_ylabel("perplexity")
    pages.finish(axes)
    table = pages.table(["", "runs", "c, P ~ M^c", "95 %"], lines)
    return _section("State-optimal", pages.figure(figure, "Perplexity at one budget against total state."), table)


def _overtrained(report: Report) -> str:
    lines = []
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, selection in _selections(report, lambda kind: kind == "overtrained").items():
        points = selection.points
        try:
            best = report.frontiers[name].best if name in report.frontiers else []
            rows = overtrained(points.params, points.tokens, selection.flops, points.loss, best)
        except ValueError as error:
            report.gaps.append(f"{name}, overtrained: {error}")
            continue
        axes.semilogx([row.ratio for row in rows], [row.gap for row in rows], "o-", color=report.colours[name], label=name)
        for row in rows:
            figures = f"{row.params:.3g}", f"{row.tokens:.3g}", f"{row.ratio:.2f}", f"{row.loss:.4f}", f"{row.gap:+.4f}"
            lines.append([_named(report, name), *figures, "outside of the budgets" if row.beyond else ""])
    if not lines:
        return ""
    axes.set_xlabel("tokens over the optimal tokens of the same FLOPs")
    axes.set_ylabel("loss above the optimum, nats")
    axes.legend(fontsize=8, frameon=False)
    pages.finish(axes)
    head = ["", "parameters", "tokens", "tokens over optimal", "loss", "gap", ""]
    return _section("Overtrained", pages.figure(figure, "What training beyond the optimum costs."), pages.table(head, lines))


def _hybrids(report: Report) -> str:
    """Loss against the share of attention, where the architectures have at least three different shares."""
    chosen, losses = _losses_at_the_largest(report)
    shares = _shares(report, losses)
    if len(set(shares.values())) < 3:
        return ""
    x, y = np.array(list(shares.values())), np.array([losses[name] for name in shares])
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, share in shares.items():
        axes.plot(100 * share, losses[name], "o", color=report.colours[name], label=name)
    axes.set_xlabel("attention among sequence mixers, percent")
    axes.set_ylabel("least loss, nats per token")
    axes.legend(fontsize=8, frameon=False)
    pages.finish(axes)
    try:
        found = hybrid_ratio(x, y)
        span = f" ({100 * found.interval.low:.0f} to {100 * found.interval.high:.0f})" if found.interval else ""
        told = (
            f"Of a parabola through all, whatever else they differ in: least at {100 * found.share:.0f} % attention{span};"
            f" {100 * found.inside:.0f} % of draws have a minimum inside."
        )
    except ValueError as error:
        told = f"No best share can be told: {error}."
    return _section("Share of attention", pages.figure(figure, f"At {chosen:.3g} FLOPs."), pages.note(told))


def _shares(report: Report, names: Collection[str]) -> dict[str, float]:
    found = {}
    for name, arch in labels_of(report.table, report.group).items():
        try:
            if name in names:
                found[name] = attention_share(arch)
        except SpecError:
            report.gaps.append(f"{name}: no share of attention: a layer of it is not known here; give its --plugin")
    return found


def _losses_at_the_largest(report: Report) -> tuple[float, Mapping[str, float]]:
    try:
        return losses_at(report.frontiers, None)
    except ValueError as error:
        report.gaps.append(str(error))
        return float("nan"), {}


# ---- MAD scores


def _scores(report: Report, table: Table) -> str:
    chosen, losses = _losses_at_the_largest(report)
    try:
        labels = {name: arch for name, arch in labels_of(report.table, report.group).items() if name in report.frontiers}
        scores = read_scores(table, labels)
        rows = correlate(scores, losses)
    except ValueError as error:
        report.gaps.append(f"MAD scores: {error}")
        return ""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    by_name = scores.get("mad_score") or next(iter(scores.values()))
    for name in sorted(set(by_name) & set(losses)):
        axes.plot(100 * by_name[name], losses[name], "o", color=report.colours[name], label=name)
    axes.set_xlabel("MAD score, percent")
    axes.set_ylabel("least loss, nats per token")
    axes.legend(fontsize=8, frameon=False)
    pages.finish(axes)
    cells = [[coefficient_text(row.coefficients[c]) if row.coefficients else "-" for c in COEFFICIENTS] for row in rows]
    lines = [[pages.text(row.task), str(row.count), *found] for row, found in zip(rows, cells, strict=True)]
    few = (
        " Too few architectures for intervals: read the signs, not the sizes."
        if min(row.count for row in rows) < FEW
        else ""
    )
    table_of = pages.table(["", "architectures", *COEFFICIENTS], lines)
    told = f"Negative: a better score goes with a lower loss. p: two-sided, of permutations.{few}"
    return _section("MAD scores", pages.figure(figure, f"At {chosen:.3g} FLOPs."), table_of, pages.note(told))
