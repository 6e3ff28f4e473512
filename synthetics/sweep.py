"""Runs of a plan, those already done left out, on an engine, into a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from madkernels.models import counting
from madkernels.models.layers import user_layers
from madkernels.models.layers.user import check_causal
from madkernels.models.spec import parse
from madkernels.synthetics.engines import Engine, InProcess, Job, Result
from madkernels.synthetics.protocol import Run
from madkernels.synthetics.store import Store
from madkernels.synthetics.together import alike
from madkernels.synthetics.train import build


class Progress(Protocol):
    """What a sweep tells while it goes on."""

    def run_starts(self, run: Run) -> None: ...
    def epoch_ends(self, run: Run, epoch: int, point: dict[str, float]) -> None: ...
    def run_ends(self, run: Run, outcome: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a sweep went."""

    trained: int
    already_done: int
    failed: int


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
    done = store.metrics()
    todo = [run for run in runs if run.key() not in done]
    check(todo)
    store.plan(runs)
    books = _Books(store, progress)
    (engine or InProcess()).run(jobs_of(todo, together), books)
    books.close()
    return Outcome(len(todo) - books.failed, len(runs) - len(todo), books.failed)


def check(runs: Sequence[Run]) -> None:
    """Raises ValueError for an architecture that cannot be trained."""
    for run in {(r.arch, r.task.autoencoder, r.training.dim): r for r in runs}.values():
        build(run)
        for spec in parse(run.arch).layers:
            if spec.name in user_layers():
                check_causal(spec.build(run.training.dim), str(spec))


def jobs_of(runs: Sequence[Run], together: bool) -> list[Job]:
    """The longest first, so that none is left alone at the end."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(alike(run) if together else run, []).append(run)
    weights = work_of(runs)
    return sorted(map(tuple, groups.values()), key=lambda job: -sum(weights[run] for run in job))


def work_of(runs: Sequence[Run]) -> dict[Run, float]:
    """Operations that each trains with at most."""
    costs: dict[Any, float] = {}
    for run in runs:
        place = run.arch, run.task, run.training.dim
        if place not in costs:
            costs[place] = 3 * counting.flops_per_token(build(run), run.task.length)
    return {run: run.size() * costs[run.arch, run.task, run.training.dim] for run in runs}


class _Books:
    """Every change of a run goes to the store, then to the progress. What cannot be written is kept, and tried again with
    the next."""

    def __init__(self, store: Store, progress: Progress) -> None:
        self.store, self.progress, self.failed = store, progress, 0
        self.unwritten: list[tuple[Run, Result]] = []

    def started(self, run: Run) -> None:
        self.progress.run_starts(run)
        try:
            self.store.start(run)
        except OSError:  # the end of the run is what matters
            return

    def epoch(self, run: Run, epoch: int, point: dict[str, float]) -> None:
        self.progress.epoch_ends(run, epoch, point)

    def ended(self, run: Run, result: Result) -> None:
        self.unwritten.append((run, result))
        told = f"failed: {result}" if isinstance(result, str) else _told(result)
        self.failed += isinstance(result, str)
        try:
            self.write()
        except OSError as error:
            told += f" ({error}; kept, and tried again)"
        self.progress.run_ends(run, told)

    def write(self) -> None:
        while self.unwritten:
            run, result = self.unwritten[0]
            self.store.fail(run, result) if isinstance(result, str) else self.store.finish(run, result)
            self.unwritten.pop(0)

    def close(self) -> None:
        try:
            self.write()
        except OSError as error:
            raise OSError(f"{len(self.unwritten)} finished runs are lost: {error}") from None


def _told(result: dict[str, Any]) -> str:
    return f"accuracy {result['accuracy']:.3f} in {result['seconds']:.0f} s"
