"""Does the runs of a plan that are not done yet, on an engine, and writes their results into a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from madkernels.runs.engines import Engine, Job, Result, Run
from madkernels.runs.store import Store

R = TypeVar("R", bound=Run)


class Progress(Protocol):
    """Receives what happens in a sweep, such as progress bars do."""

    def run_starts(self, run: Any) -> None: ...
    def point(self, run: Any, number: int, point: dict[str, float]) -> None: ...
    def run_ends(self, run: Any, outcome: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a sweep went."""

    trained: int
    already_done: int
    failed: int

    def __add__(self, other: Outcome) -> Outcome:
        """Of two that follow one another."""
        return Outcome(self.trained + other.trained, self.already_done + other.already_done, self.failed + other.failed)


def left(runs: Sequence[R], store: Store) -> list[R]:
    """The runs that are not done yet."""
    done = store.metrics()
    return [run for run in runs if run.key() not in done]


def execute(
    runs: Sequence[Run],
    jobs: Sequence[Job],
    store: Store,
    progress: Progress,
    engine: Engine,
    summarise: Callable[[dict[str, Any]], str],
) -> Outcome:
    """Does the jobs of a plan. A run that fails is kept as failed, and the others go on.

    Args:
        runs: all runs of the plan.
        jobs: the runs that are not done yet, in the order in which they are to be done.
        summarise: puts a result into a few words, for the progress.

    Raises:
        OSError: results could not be written to the end; those that could are kept.
    """
    store.plan(runs)
    books = _Books(store, progress, summarise)
    try:
        engine.run(jobs, books)
    finally:
        books.close()
    todo = sum(map(len, jobs))
    return Outcome(todo - books.failed, len(runs) - todo, books.failed)


class _Books:
    """Every change of a run goes to the store, then to the progress. What cannot be written is kept, and tried again with
    the next."""

    def __init__(self, store: Store, progress: Progress, summarise: Callable[[dict[str, Any]], str]) -> None:
        self.store, self.progress, self.summarise, self.failed = store, progress, summarise, 0
        self.unwritten: list[tuple[Run, Result]] = []

    def started(self, run: Run) -> None:
        self.progress.run_starts(run)
        try:
            self.store.start(run)
        except OSError:  # the end of the run is what matters
            return

    def point(self, run: Run, number: int, point: dict[str, float]) -> None:
        self.progress.point(run, number, point)

    def ended(self, run: Run, result: Result) -> None:
        self.unwritten.append((run, result))
        outcome = f"failed: {result}" if isinstance(result, str) else self.summarise(result)
        self.failed += isinstance(result, str)
        try:
            self.write()
        except OSError as error:
            outcome += f" ({error}; kept, and tried again)"
        self.progress.run_ends(run, outcome)

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
