"""Results as a table and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from madkernels.models import counting
from madkernels.synthetics.protocol import Run, Score, mad_score, scores
from madkernels.synthetics.store import Store
from madkernels.synthetics.train import build


def table(runs: Sequence[Run], store: Store) -> Table:
    """Tasks by architectures; the MAD score is the mean over tasks."""
    by_arch = scores(runs, store.metrics())
    out = Table(title="Accuracy on held-out sequences, in percent", caption=_caption(by_arch, runs))
    out.add_column("task", no_wrap=True)
    for arch in by_arch:
        out.add_column(arch, justify="right", overflow="fold")
    for task in dict.fromkeys(run.task.name for run in runs):
        out.add_row(task, *(_percent(by_task[task].value) for by_task in by_arch.values()))
    out.add_section()
    means = (_percent(mad_score(by_task)) for by_task in by_arch.values())
    out.add_row("MAD score", *means, style="bold", end_section=True)
    costs = [_cost(arch, runs) for arch in by_arch]
    out.add_row("parameters", *(parameters for parameters, _ in costs), style="dim")
    out.add_row("state", *(state for _, state in costs), style="dim")
    return out


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _cost(arch: str, runs: Sequence[Run]) -> tuple[str, str]:
    run = next(run for run in runs if run.arch == arch)
    model = build(run)
    layers = sum(p.numel() for layer in counting.layers(model) for p in layer.parameters())
    return f"{layers:,}", f"{counting.state_size(model, run.task.length):,}"


def _caption(by_arch: dict[str, dict[str, Score]], runs: Sequence[Run]) -> str:
    length = runs[0].task.length
    text = f"Parameters of the layers; state: elements kept for one sequence of length {length}."
    settings = {score.settings for tasks in by_arch.values() for score in tasks.values()}
    if settings != {1}:
        text += " A task's score is the mean over its settings."
    return text


def write_csv(runs: Sequence[Run], store: Store, folder: Path) -> tuple[Path, Path]:
    """`results.csv`, an architecture a row, and `runs.csv`, a run a row; returns both paths."""
    by_arch = scores(runs, store.metrics())
    tasks = list(dict.fromkeys(run.task.name for run in runs))
    scores_path, runs_path = folder / "results.csv", folder / "runs.csv"
    with scores_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arch", *tasks, "mad_score"])
        for arch, by_task in by_arch.items():
            writer.writerow([arch, *(by_task[task].value for task in tasks), mad_score(by_task)])
    rows = store.rows()
    task_options = list(dict.fromkeys(k for row in rows for k in row["config"]["task"]))
    training = list(dict.fromkeys(k for row in rows for k in row["config"]["training"]))
    measured = ["accuracy", "macro_accuracy", "loss", "validation_accuracy", "epochs", "seconds"]
    with runs_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "version", "arch", *task_options, *training, "status", *measured, "error"])
        for row in rows:
            config, metrics = row["config"], row["metrics"] or {}
            writer.writerow(
                [
                    row["key"],
                    config["version"],
                    config["arch"],
                    *(config["task"].get(k) for k in task_options),
                    *(config["training"].get(k) for k in training),
                    row["status"],
                    *(metrics.get(k) for k in measured),
                    row["error"],
                ]
            )
    return scores_path, runs_path
