"""A sweep of MAD runs: those that are not done yet, checked, sorted and grouped for :mod:`madkernels.runs.execute`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from madkernels.models import counting
from madkernels.runs.engines import Engine, InProcess
from madkernels.runs.execute import Outcome, Progress, execute, left
from madkernels.runs.store import Store
from madkernels.synthetics.honesty import check_layers
from madkernels.synthetics.protocol import Run
from madkernels.synthetics.together import alike
from madkernels.synthetics.train import build


def sweep(
    runs: Sequence[Run], store: Store, progress: Progress, *, engine: Engine | None = None, together: bool = False
) -> Outcome:
    """Trains what is not done yet, the longest first. A run that fails is kept as failed, and the sweep goes on.

    Args:
        runs: of a plan.
        engine: this process if absent.
        together: whether the runs of a setting train as one model: on a GPU.

    Raises:
        ValueError: an architecture does not go with the width, or a layer from outside is not causal; before anything is
            trained.
        OSError: results could not be written to the end; those that could are kept.
    """
    todo = left(runs, store)
    check(todo)
    return execute(runs, jobs_of(todo, together), store, progress, engine or InProcess(), _summarise)


def check(runs: Sequence[Run]) -> None:
    """Raises ValueError for an architecture that cannot be trained."""
    for run in {(r.arch, r.task.autoencoder, r.training.dim): r for r in runs}.values():
        build(run)
    check_layers(runs)


def jobs_of(runs: Sequence[Run], together: bool) -> list[tuple[Run, ...]]:
    """The longest first, so that none is left alone at the end."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(alike(run) if together else run, []).append(run)
    weights = work_of(runs)
    return sorted(map(tuple, groups.values()), key=lambda job: -sum(weights[run] for run in job))


def work_of(runs: Sequence[Run]) -> dict[Run, float]:
    """Most training FLOPs of each run."""
    costs: dict[Any, float] = {}
    for run in runs:
        place = run.arch, run.task, run.training.dim
        if place not in costs:
            costs[place] = counting.training_flops(build(run), run.task.length)
    return {run: run.tokens * costs[run.arch, run.task, run.training.dim] for run in runs}


def _summarise(result: dict[str, Any]) -> str:
    return f"accuracy {result['accuracy']:.3f} in {result['seconds']:.0f} s"
