"""A report of scaling runs as one HTML page: best sizes, losses at budgets, the surface, state, overtraining, MAD scores.

What is missing or cannot be trusted stands first: failed runs, minima at the edge of the sizes, fits that did not converge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from madkernels.models.spec import SpecError
from madkernels.reporting import pages
from madkernels.reporting.figures import COLOURS, INK, Panel
from madkernels.reporting.pages import Section
from madkernels.scaling.fits import surface
from madkernels.scaling.fits.beyond_size import attention_share, hybrid_ratio, overtrained, state_law
from madkernels.scaling.fits.compare import BootstrapOptions, Frontier, compare, crossing_text, estimate_text, frontiers
from madkernels.scaling.fits.correlate import (
    COEFFICIENTS,
    FEW,
    coefficient_text,
    correlate,
    labels_of,
    losses_at,
    read_scores,
)
from madkernels.scaling.fits.form import FLOPS, NAMES, Points
from madkernels.scaling.fits.isoflop import through
from madkernels.scaling.fits.runs_table import Columns, Cut, Selection, Table, by_group, kinds_of, select, shortened
from madkernels.scaling.fits.statistics import interval
from madkernels.scaling.fits.surface import Bootstrap, Fit

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
    colours = dict(zip(names, cycle(COLOURS), strict=False))
    gaps = [f"{row.place}: {row.why}" for row in dropped]
    gaps += [f"{name}: {why}" for name, f in found.items() for why in f.left_out + f.warnings]
    report = Report(table, columns, group, budget, how, cut, found, colours, gaps)
    sections = [_losses(report), _isoflop(report), _best_sizes(report), _surfaces(report)]
    sections += [_states(report), _overtrained(report), _hybrids(report)]
    sections += [_scores(report, scores)] if scores else []
    budgets = sorted({b for f in found.values() for b in f.budgets})
    facts = f"{len(table)} runs of {len(found)} architectures; budgets {', '.join(f'{b:.3g}' for b in budgets)} FLOPs."
    return pages.document(title, facts, shortened(report.gaps, TOLD_GAPS), sections)


def _named(report: Report, name: str) -> Markup:
    return pages.swatch(name, report.colours[name])


def _legend(report: Report, names: Collection[str]) -> dict[str, str]:
    """The colours of those architectures that a figure shows."""
    return {name: colour for name, colour in report.colours.items() if name in names}


# ---- IsoFLOP runs


def _isoflop(report: Report) -> Section:
    colours = budget_colours(report.frontiers)
    caption = f"Loss in nats per token over parameters, and a {report.how.shape} for each budget of FLOPs. Stars: minima."
    drawn = pages.figure(isoflop_panels(report.frontiers, report.how.shape), caption, _budget_legend(colours), same_y=True)
    return Section("Loss against size at each budget", [drawn])


def budget_colours(found: Mapping[str, Frontier]) -> dict[float, str]:
    """A colour for each budget, the same for all architectures."""
    return dict(zip(sorted({budget for f in found.values() for budget in f.budgets}), cycle(COLOURS), strict=False))


def _budget_legend(colours: Mapping[float, str]) -> dict[str, str]:
    return {f"{budget:.3g}": colour for budget, colour in colours.items()}


def isoflop_panels(found: Mapping[str, Frontier], shape: str) -> list[Panel]:
    """For each architecture its IsoFLOP curves."""
    colours = budget_colours(found)
    return [Panel(name, partial(_draw_curves, found=f, shape=shape, colours=colours)) for name, f in found.items()]


def _draw_curves(axes: Axes, found: Frontier, shape: str, colours: Mapping[float, str]) -> None:
    for curve, best in zip(found.curves, found.best, strict=True):
        fine, colour = np.linspace(curve.x[0], curve.x[-1], 200), colours[curve.budget]
        axes.plot(np.exp(curve.x), curve.y, "o", ms=4, color=colour)
        axes.plot(np.exp(fine), through(curve, shape)(fine), color=colour, lw=1)
        if not best.edge:
            axes.plot(best.params, best.loss, "*", ms=10, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("parameters")


def _best_sizes(report: Report) -> Section:
    panels = [
        Panel(title, partial(_draw_best, report=report, what=what))
        for title, what in (("best size, parameters", "params"), ("best number of tokens", "tokens"))
    ]
    lines = [[_named(report, name), _exponent(found)] for name, found in report.frontiers.items()]
    caption = (
        "Size and tokens of least loss over training FLOPs. Budgets whose minimum is at the edge of the sizes are left out."
    )
    drawn = pages.figure(panels, caption, _legend(report, report.frontiers))
    told = "The exponent a of N_opt ~ C^a: how fast the best size grows with the budget, with its 95 % interval."
    table = pages.table(["architecture", "exponent a"], lines)
    return Section("Best size", [pages.beside(drawn, table), pages.note(told)])


def _draw_best(axes: Axes, report: Report, what: str) -> None:
    for name, found in report.frontiers.items():
        inside = [b for b in found.best if not b.edge]
        axes.loglog([b.flops for b in inside], [getattr(b, what) for b in inside], "o-", ms=4, color=report.colours[name])
    axes.set_xlabel("training FLOPs")


def _exponent(found: Frontier) -> str:
    usable = found.exponents[np.isfinite(found.exponents)]
    if not np.isfinite(found.a):
        return "-"
    within = interval(usable) if len(usable) > 1 else None
    return f"{found.a:.3f}" + (f" ({within.low:.3f} to {within.high:.3f})" if within else "")


def _losses(report: Report) -> Section:
    drawn = pages.figure(
        [Panel("least loss, nats per token", partial(_draw_losses, report=report))],
        "Least loss over training FLOPs, with 95 % intervals.",
        _legend(report, report.frontiers),
    )
    differences = _differences(report) if len(report.frontiers) > 1 else []
    return Section("Loss at a budget", [pages.beside(drawn, _least_losses(report)), *differences])


def _draw_losses(axes: Axes, report: Report) -> None:
    for name, found in report.frontiers.items():
        middle = np.array([b.loss for b in found.best])
        low, high = np.percentile(found.losses, [2.5, 97.5], axis=0) if len(found.losses) else (middle, middle)
        errors = np.maximum([middle - low, high - middle], 0)
        flops = [b.flops for b in found.best]
        axes.errorbar(flops, middle, yerr=errors, marker="o", ms=4, capsize=3, color=report.colours[name])
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")


def _least_losses(report: Report) -> Markup:
    """The least loss of each architecture at each budget, the lowest at the largest budget first."""
    budgets = sorted({b.budget for found in report.frontiers.values() for b in found.best}, reverse=True)
    losses = {name: {b.budget: b.loss for b in found.best} for name, found in report.frontiers.items()}
    ranked = sorted(losses, key=lambda name: [losses[name].get(budget, np.inf) for budget in budgets])
    lines = [
        [_named(report, name), *(f"{losses[name][b]:.4f}" if b in losses[name] else "-" for b in budgets)] for name in ranked
    ]
    return pages.table(["architecture", *(f"at {budget:.3g}" for budget in budgets)], lines)


def _differences(report: Report) -> list[Markup]:
    found = compare(report.frontiers)
    budgets = sorted({budget for difference in found for budget in difference.losses}, reverse=True)
    lines = [
        [
            _named(report, d.architecture),
            *(estimate_text(d.losses.get(budget)) for budget in budgets),
            estimate_text(d.exponent),
            crossing_text(d.crossing),
        ]
        for d in found
    ]
    head = ["architecture", *(f"loss at {budget:.3g}" for budget in budgets), "exponent a", "its curve crosses at"]
    told = f"Differences to {found[0].base} with 95 % intervals; losses in nats. An ! marks intervals without zero."
    return [pages.heading(f"Compared with {found[0].base}"), pages.table(head, lines), pages.note(told)]


# ---- the surface


def _surfaces(report: Report) -> Section | None:
    """The surface of each architecture, through all runs but those that change the state."""
    lines, drawn = [], []
    for name, selection in _selections(report, lambda kind: kind != "state").items():
        try:
            fit = surface.fit(selection.points)
        except ValueError as error:
            report.gaps.append(f"{name}: no surface: {error}")
            continue
        if not fit.proof.converged:
            report.gaps.append(f"{name}: the surface is not to be trusted: {fit.proof}")
        else:
            drawn.append((name, selection, fit))
        resampled = surface.bootstrap(selection.points, fit, RESAMPLES)
        if resampled.unconverged:
            report.gaps.append(f"{name}: {resampled.unconverged} of {RESAMPLES} resamples of the surface did not converge")
        lines.append([_named(report, name), *_parameters(fit, resampled)])
    if not lines:
        return None
    head = ["architecture", "points", *NAMES[:-1], "a, 95 %", "starts that end there", "gradient"]
    told = (
        "L(N, D) = E + A / N^alpha + B / D^beta, and a = beta / (alpha + beta). The fit was started from many places: most "
        "should end at the same minimum, where the gradient is near zero. A fit that did not converge is not drawn."
    )
    return Section("Loss surface", [*_contours(drawn), pages.table(head, lines), pages.note(told)])


def _parameters(fit: Fit, resampled: Bootstrap) -> list[str]:
    within, proof = resampled.interval("a"), fit.proof
    return [
        str(fit.count),
        *(f"{getattr(fit.surface, name):.4g}" for name in NAMES[:-1]),
        f"{within.low:.3f} to {within.high:.3f}",
        f"{proof.agreeing} of {proof.seeds}",
        f"{proof.gradient_norm:.1e}",
    ]


def _contours(drawn: list[tuple[str, Selection, Fit]]) -> list[Markup]:
    if not drawn:
        return []
    panels = [Panel(name, partial(_draw_contours, points=selection.points, fit=fit)) for name, selection, fit in drawn]
    caption = "Parameters over FLOPs, 6 N D. Lines: the fitted loss. Points: the runs. Orange: the best size at each budget."
    return [pages.figure(panels, caption)]


def _draw_contours(axes: Axes, points: Points, fit: Fit) -> None:
    flops = FLOPS * points.params * points.tokens
    across = np.geomspace(flops.min() / 2, flops.max() * 2, 80)
    sizes = np.geomspace(points.params.min() / 2, points.params.max() * 2, 80)
    c, n = np.meshgrid(across, sizes)
    levels = np.linspace(points.loss.min(), points.loss.max(), 5)
    lines = axes.contour(c, n, fit.surface.loss(n, c / FLOPS / n), levels=levels, colors=[INK], linewidths=0.5)
    axes.clabel(lines, fmt="%.2f")
    axes.plot(flops, points.params, ".", color=COLOURS[0], ms=4)
    axes.plot(across, [fit.surface.optimum(budget).params for budget in across], color=COLOURS[1], lw=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(sizes[0], sizes[-1])
    axes.set_xlabel("FLOPs")


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


def _states(report: Report) -> Section | None:
    drawn, lines = {}, []
    for name, selection in _selections(report, lambda kind: kind == "state").items():
        state, loss = selection.table.numbers("state"), selection.points.loss
        try:
            found = state_law(state, loss)
        except ValueError as error:
            report.gaps.append(f"{name}: {error}")
            continue
        drawn[name] = state, np.exp(loss), found.law
        span = f"{found.interval.low:.3f} to {found.interval.high:.3f}" if found.interval else "too few runs"
        lines.append([_named(report, name), f"{found.law.exponent:.3f}", span, str(found.count)])
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for name, (state, perplexity, law) in drawn.items():
            axes.loglog(state, perplexity, "o", ms=4, color=report.colours[name])
            axes.loglog(state, [law.at(m) for m in state], color=report.colours[name])
        axes.set_xlabel("total state, elements")

    picture = pages.figure([Panel("perplexity", draw)], "Perplexity at one budget over total state.", _legend(report, drawn))
    table = pages.table(["architecture", "exponent c of P ~ M^c", "95 %", "runs"], lines)
    return Section("State", [pages.beside(picture, table)])


def _overtrained(report: Report) -> Section | None:
    drawn, lines = {}, []
    for name, selection in _selections(report, lambda kind: kind == "overtrained").items():
        points = selection.points
        try:
            best = report.frontiers[name].best if name in report.frontiers else []
            rows = overtrained(points.params, points.tokens, selection.flops, points.loss, best)
        except ValueError as error:
            report.gaps.append(f"{name}, overtrained: {error}")
            continue
        drawn[name] = rows
        for row in rows:
            figures = f"{row.params:.3g}", f"{row.tokens:.3g}", f"{row.ratio:.2f}", f"{row.loss:.4f}", f"{row.gap:+.4f}"
            lines.append([_named(report, name), *figures, "extrapolated" if row.beyond else ""])
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for name, rows in drawn.items():
            axes.semilogx([r.ratio for r in rows], [r.gap for r in rows], "o-", ms=4, color=report.colours[name])
        axes.set_xlabel("tokens over the optimal tokens of the same FLOPs")

    caption = "What training beyond the optimal number of tokens costs, in nats above the least loss of the same FLOPs."
    picture = pages.figure([Panel("loss above the optimum", draw)], caption, _legend(report, drawn))
    head = ["architecture", "parameters", "tokens", "tokens over optimal", "loss", "above the optimum", "remark"]
    told = "Extrapolated: the FLOPs of the run lie outside of the budgets, so the optimum there is a guess."
    return Section("Overtrained", [pages.beside(picture, pages.table(head, lines)), pages.note(told)])


def _hybrids(report: Report) -> Section | None:
    """Loss against the share of attention, where the architectures have at least three different shares."""
    chosen, losses = _losses_at_the_largest(report)
    shares = _shares(report, losses)
    if len(set(shares.values())) < 3:
        return None
    percents = {name: 100 * share for name, share in shares.items()}
    drawn = _scatter(report, percents, losses, "attention among sequence mixers, percent", chosen)
    try:
        found = hybrid_ratio(np.array(list(shares.values())), np.array([losses[name] for name in shares]))
        span = f" ({100 * found.interval.low:.0f} to {100 * found.interval.high:.0f})" if found.interval else ""
        told = (
            f"A parabola through all of them, whatever else they differ in, is lowest at {100 * found.share:.0f} % "
            f"attention{span}. In {100 * found.inside:.0f} % of resamples its minimum lies inside."
        )
    except ValueError as error:
        told = f"No best share can be given: {error}."
    return Section("Share of attention", [pages.beside(drawn, pages.note(told))])


def _scatter(report: Report, places: Mapping[str, float], losses: Mapping[str, float], what: str, budget: float) -> Markup:
    """Least losses at a budget over something else: a point for each architecture that has both."""
    names = [name for name in losses if name in places]

    def draw(axes: Axes) -> None:
        for name in names:
            axes.plot(places[name], losses[name], "o", color=report.colours[name])
        axes.set_xlabel(what)

    panel = Panel("least loss, nats per token", draw)
    return pages.figure([panel], f"At {budget:.3g} FLOPs.", _legend(report, names))


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


def _scores(report: Report, table: Table) -> Section | None:
    chosen, losses = _losses_at_the_largest(report)
    try:
        labels = {name: arch for name, arch in labels_of(report.table, report.group).items() if name in report.frontiers}
        scores = read_scores(table, labels)
        rows = correlate(scores, losses)
    except ValueError as error:
        report.gaps.append(f"MAD scores: {error}")
        return None
    by_name = scores.get("mad_score") or next(iter(scores.values()))
    percents = {name: 100 * score for name, score in by_name.items()}
    drawn = _scatter(report, percents, losses, "MAD score, percent", chosen)
    cells = [[coefficient_text(row.coefficients[c]) if row.coefficients else "-" for c in COEFFICIENTS] for row in rows]
    lines = [[row.task, *found, str(row.count)] for row, found in zip(rows, cells, strict=True)]
    few = (
        " Too few architectures for intervals: read the signs, not the sizes."
        if min(row.count for row in rows) < FEW
        else ""
    )
    table_of = pages.table(["task", *(name.capitalize() for name in COEFFICIENTS), "architectures"], lines)
    told = f"Negative: a better score goes with a lower loss. p: two-sided, of permutations.{few}"
    return Section("MAD scores", [pages.beside(drawn, table_of), pages.note(told)])
