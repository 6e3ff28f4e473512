"""Results as tables and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madkernels.models import counting
from madkernels.reporting.tables import Table
from madkernels.synthetics.protocol import Results, Run, Score, mad_score, margin, mean, results_of, scores
from madkernels.synthetics.train import build

FAIR = 0.1  # parts by which state and parameters may differ between architectures that are compared


@dataclass(frozen=True)
class Cost:
    """What an architecture takes: parameters of its layers, elements of state for a sequence, forward FLOPs per token."""

    parameters: int
    state: int
    flops: float


def cost_of(run: Run) -> Cost | None:
    """The cost of a run's architecture, at the width and length of the run; None where it cannot be built here."""
    try:
        model = build(run)
    except ValueError:  # a layer from outside that is not here
        return None
    length = run.task.length
    return Cost(counting.layer_params(model), counting.state_size(model, length), counting.flops_per_token(model, length))


def costs_of(results: Results) -> dict[str, Cost | None]:
    """The cost of each architecture, at the first setting of the first task."""
    first = results[0][0] if results else None
    by_arch = {run.arch: run for run, _ in reversed(results) if first and run.task == first.task}
    return {arch: cost_of(run) for arch, run in reversed(by_arch.items())}


def label(arch: str) -> str:
    """An architecture with repetitions written as a count."""
    words = arch.split(" ")
    for period in range(1, len(words) // 2 + 1):
        times, rest = divmod(len(words), period)
        if not rest and words == words[:period] * times:
            unit = " ".join(words[:period])
            return f"{times}*({unit})" if period > 1 else f"{times}*{unit}"
    return arch


def unequal(costs: dict[str, Cost | None]) -> str:
    """A sentence on what is not equal between architectures that should be compared at equal state and parameters."""
    parts = []
    for name, verb in (("state", "keeps"), ("parameters", "has")):
        known = {arch: getattr(cost, name) for arch, cost in costs.items() if cost}
        if known and max(known.values()) > (1 + FAIR) * min(known.values()):
            least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            if known[least]:
                parts.append(f"{label(most)} {verb} {known[most] / known[least]:.2g} times the {name} of {label(least)}")
            else:
                parts.append(f"{label(least)} {verb} no {name}, {label(most)} {known[most]:,}")
    return f"The sizes are not equal: {', and '.join(parts)}." if parts else ""


def table(results: Results, measure: str = "accuracy") -> Table:
    """Tasks by architectures; the MAD score is the mean over tasks."""
    by_arch, costs = scores(results, measure), costs_of(results)
    out = Table(title=f"{measure.replace('_', ' ').capitalize()} on test sequences, in percent", caption=_caption(results))
    out.add_column("task", no_wrap=True)
    for arch in by_arch:
        out.add_column(label(arch), justify="right")
    for task in dict.fromkeys(run.task.name for run, _ in results):
        out.add_row(task, *(percent(by_task.get(task)) for by_task in by_arch.values()))
    out.add_section()
    out.add_row("MAD score", *(percent(mad_score(by_task)) for by_task in by_arch.values()), style="bold", end_section=True)
    rows = {"parameters": "parameters", "state": "state", "FLOPs per token": "flops"}
    for title, name in rows.items():
        values = (f"{getattr(cost, name):,.0f}" if (cost := costs.get(arch)) else "-" for arch in by_arch)
        out.add_row(title, *values, style="dim")
    return out


def percent(score: Score | None) -> str:
    """A score in percent, with its 95 % interval where there are seeds, and a star where settings are missing."""
    if score is None or score.value is None:
        return "-"
    within = "" if score.margin is None else f" ± {100 * score.margin:.1f}"
    return f"{100 * score.value:.1f}{within}{'' if score.done == score.settings else '*'}"


def _caption(results: Results) -> str:
    if not results:
        return "There are no runs."
    text = f"Parameters of the layers; state and forward FLOPs for one sequence of length {results[0][0].task.length}."
    by_arch = scores(results)
    if {score.settings for tasks in by_arch.values() for score in tasks.values()} != {1}:
        text += " A task's score is the mean over its settings."
    if any(score.done < score.settings for tasks in by_arch.values() for score in tasks.values()):
        text += " * Some settings have no result yet."
    return f"{text} {unequal(costs_of(results))}".strip()


def compare(results: Results, measure: str = "accuracy") -> Table:
    """Each architecture against the first, seed by seed: differences with 95 % intervals."""
    by_arch = scores(results, measure)
    if len(by_arch) < 2:
        raise ValueError("comparing takes two architectures at least")
    base, *others = by_arch
    out = Table(title=f"Difference to {label(base)}, in points", caption=_comparison_caption(results))
    out.add_column("task", no_wrap=True)
    for arch in others:
        out.add_column(label(arch), justify="right")
    tasks = list(dict.fromkeys(run.task.name for run, _ in results))
    for task in tasks:
        out.add_row(task, *(_difference(by_arch[base].get(task), by_arch[arch].get(task)) for arch in others))
    out.add_section()
    whole = (_difference(mad_score(by_arch[base]), mad_score(by_arch[arch])) for arch in others)
    out.add_row("MAD score", *whole, style="bold")
    return out


def _difference(base: Score | None, other: Score | None) -> str:
    """The difference over the seeds that both have; marked where zero is outside of the interval."""
    shared = sorted(set(base.by_seed) & set(other.by_seed)) if base and other else []
    if not shared or base is None or other is None:
        return "-"
    values = [100 * (other.by_seed[seed] - base.by_seed[seed]) for seed in shared]
    within = margin(values)
    if within is None:
        return f"{mean(values):+.1f}"
    return f"{mean(values):+.1f} ± {within:.1f}{' !' if abs(mean(values)) > within else ''}"


def _comparison_caption(results: Results) -> str:
    seeds = {run.training.seed for run, _ in results}
    return "95 % intervals over seeds; ! zero is outside." if len(seeds) > 1 else "One seed: no interval can be given."


def write_csv(rows: Sequence[dict[str, Any]], folder: Path) -> tuple[Path, Path]:
    """`results.csv`, one architecture per row, and `runs.csv`, one run per row; returns both paths."""
    results = results_of(rows)
    by_arch, costs = scores(results), costs_of(results)
    tasks = list(dict.fromkeys(run.task.name for run, _ in results))
    scores_path, runs_path = folder / "results.csv", folder / "runs.csv"
    with scores_path.open("w", newline="") as file:
        writer = csv.writer(file)
        intervals = [f"{task}_margin" for task in tasks]
        writer.writerow(["arch", *tasks, "mad_score", *intervals, "mad_margin", "parameters", "state", "flops_per_token"])
        for arch, by_task in by_arch.items():
            found = [by_task.get(task, Score({}, 0, 0)) for task in tasks] + [mad_score(by_task)]
            cost = costs.get(arch)
            counts = [cost.parameters, cost.state, cost.flops] if cost else [None] * 3
            writer.writerow([arch, *(s.value for s in found), *(s.margin for s in found), *counts])
    task_options = list(dict.fromkeys(k for row in rows for k in row["config"]["task"]))
    training = list(dict.fromkeys(k for row in rows for k in row["config"]["training"]))
    measured = ["accuracy", "macro_accuracy", "loss", "held_out_accuracy", "epochs", "seconds"]
    with runs_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "version", "arch", *task_options, *training, "status", *measured, "error"])
        for row in rows:
            config, metrics = row["config"], row["metrics"] or {}
            options = [config["task"].get(k) for k in task_options] + [config["training"].get(k) for k in training]
            figures = [metrics.get(k) for k in measured]
            writer.writerow([row["key"], config["version"], config["arch"], *options, row["status"], *figures, row["error"]])
    return scores_path, runs_path
