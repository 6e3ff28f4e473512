"""MAD scores against the loss that architectures come to at a budget: does a day of small tasks tell how a model scales?

Pearson's, Spearman's and Kendall's coefficients over architectures; a score that predicts is negative with the loss. The p
value is that of permutations, all of them for few architectures, so it is exact at any size. Intervals come from resampling
architectures, which means little below FEW of them: then there is none, and that is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from scipy.stats import kendalltau, pearsonr, permutation_test, spearmanr

from madkernels.models.presets import layers_of
from madkernels.reporting.tables import Table as Shown
from madkernels.scaling.fits.compare import Frontier
from madkernels.scaling.fits.runs_table import Table
from madkernels.scaling.fits.statistics import Array, Interval, interval

FEW = 6  # architectures below which resampling them gives no interval worth the name
RESAMPLES = 1000
EXACT = 5040  # permutations up to which all are tried
NOT_TASKS = ("arch", "architecture", "parameters", "state", "flops_per_token")
COEFFICIENTS: dict[str, Callable[[Array, Array], Any]] = {"pearson": pearsonr, "spearman": spearmanr, "kendall": kendalltau}


@dataclass(frozen=True)
class Correlation:
    """One coefficient: its value, two-sided p of permutations, and interval if there are architectures enough."""

    value: float
    p: float
    interval: Interval | None


@dataclass(frozen=True)
class TaskCorrelation:
    """Correlation coefficients of a task (or of mad_score) by name; None where all values are alike."""

    task: str
    count: int
    coefficients: dict[str, Correlation] | None


def read_scores(table: Table, labels: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """By task, then by architecture, the scores of `madkernels mad run`'s results.csv.

    labels: of the runs, architecture to its layers. They are matched by a column `architecture` where the scores have one,
    and else by the shares of the kinds of layers, since widths and depths differ. ValueError where that is ambiguous or
    nothing matches.
    """
    if "architecture" in table.columns:
        names: list[str | None] = list(table.column("architecture"))
    else:
        by_kind = {_kinds(arch): label for label, arch in labels.items()}
        if alike := set(labels) - set(by_kind.values()):
            raise ValueError(f"others have the layers of {', '.join(sorted(alike))} too: give scores a column architecture")
        names = [by_kind.get(_kinds(arch)) for arch in table.column("arch")]
    known = [name for name in names if name in labels]
    if not known:
        raise ValueError(f"none of the scored architectures is one of the runs: {', '.join(labels)}")
    if twice := {str(name) for name in known if known.count(name) > 1}:
        raise ValueError(
            f"several scores are of {', '.join(sorted(twice))}: add a column architecture that tells which counts"
        )
    tasks = [name for name in table.columns if name not in NOT_TASKS and not name.endswith("_margin")]
    return {task: _by_name(table.numbers(task), names, labels) for task in tasks}


def _by_name(values: Array, names: list[str | None], labels: Mapping[str, str]) -> dict[str, float]:
    found = zip(names, values, strict=True)
    return {name: float(value) for name, value in found if name in labels and name is not None and np.isfinite(value)}


def _kinds(arch: str) -> frozenset[tuple[str, int]]:
    """Layers by name, in their proportions."""
    try:
        counts = Counter(spec.name for spec in layers_of(arch))
    except ValueError:  # a layer from outside that is not here
        return frozenset({(arch, 1)})
    unit = gcd(*counts.values())
    return frozenset((name, count // unit) for name, count in counts.items())


def labels_of(table: Table, group: str) -> dict[str, str]:
    """For each value of the column `group`, the architecture of its first run."""
    rows = list(zip(table.column(group), table.column("arch"), strict=True))
    return dict(reversed(rows))


def losses_at(frontiers: Mapping[str, Frontier], budget: float | None) -> tuple[float, dict[str, float]]:
    """The budget, or the largest that all have; and the least loss there of those that have it."""
    chosen = _largest_shared(frontiers) if budget is None else budget
    found = {name: b.loss for name, f in frontiers.items() for b in f.best if np.isclose(b.budget, chosen)}
    if not found:
        known = sorted({c for f in frontiers.values() for c in f.budgets})
        raise ValueError(f"no run has the budget {chosen:.3g}; there are: {', '.join(f'{c:.3g}' for c in known)}")
    return chosen, found


def _largest_shared(frontiers: Mapping[str, Frontier]) -> float:
    shared = set.intersection(*(set(found.budgets) for found in frontiers.values()))
    if not shared:
        raise ValueError("there is no budget that all architectures have: give --at")
    return max(shared)


def correlate(
    scores: Mapping[str, Mapping[str, float]], losses: Mapping[str, float], seed: int = 42
) -> list[TaskCorrelation]:
    """One row per task. losses: by architecture, in nats at one budget. ValueError for fewer than three that both have."""
    found = []
    for task, by_name in scores.items():
        shared = sorted(set(by_name) & set(losses))
        x, y = np.array([by_name[name] for name in shared]), np.array([losses[name] for name in shared])
        found.append(TaskCorrelation(task, len(shared), _coefficients(x, y, seed)))
    if max((row.count for row in found), default=0) < 3:
        raise ValueError("fewer than three architectures have both scores and a loss at the budget: nothing can be related")
    return found


def _coefficients(x: Array, y: Array, seed: int) -> dict[str, Correlation] | None:
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return {name: _correlation(_plain(of), x, y, seed) for name, of in COEFFICIENTS.items()}


def _plain(of: Callable[[Array, Array], Any]) -> Callable[[Array, Array], float]:
    return lambda x, y: float(of(x, y)[0])


def _correlation(of: Callable[[Array, Array], float], x: Array, y: Array, seed: int) -> Correlation:
    rng = np.random.default_rng(seed)
    test = permutation_test(
        (y,),
        lambda drawn: abs(of(x, drawn)),
        permutation_type="pairings",
        vectorized=False,
        n_resamples=EXACT,
        alternative="greater",
        rng=rng,
    )
    return Correlation(of(x, y), float(test.pvalue), _resampled(of, x, y, rng) if len(x) >= FEW else None)


def _resampled(of: Callable[[Array, Array], float], x: Array, y: Array, rng: np.random.Generator) -> Interval:
    draws: list[float] = []
    while len(draws) < RESAMPLES:
        rows = rng.integers(len(x), size=len(x))
        if len(set(x[rows])) > 1 and len(set(y[rows])) > 1:
            draws.append(of(x[rows], y[rows]))
    return interval(np.array(draws))


def correlation_table(rows: list[TaskCorrelation], budget: float) -> Shown:
    counts = sorted({row.count for row in rows})
    caption = "Negative: a better score goes with a lower loss. p: two-sided, of permutations."
    if counts[0] < FEW:
        caption += f" {counts[0]} architectures are too few for intervals: read the signs, not the sizes."
    out = Shown(title=f"MAD scores against the least loss at {budget:.3g} FLOPs", caption=caption)
    out.add_column("task", no_wrap=True)
    for name in ("architectures", *COEFFICIENTS):
        out.add_column(name, justify="right")
    for row in rows:
        found = [coefficient_text(row.coefficients[name]) if row.coefficients else "-" for name in COEFFICIENTS]
        out.add_row(row.task, str(row.count), *found)
    return out


def coefficient_text(found: Correlation) -> str:
    span = f" ({found.interval.low:+.2f} to {found.interval.high:+.2f})" if found.interval else ""
    return f"{found.value:+.2f}{span}, p {found.p:.2g}"
