"""Runs of a plan, those already done left out: in this process, or in a pool of processes of one thread each.

A run trains with one thread wherever it is trained, so its result does not depend on the number of workers; and small models
gain more from runs side by side than from threads.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from madkernels.synthetics.protocol import Run
from madkernels.synthetics.store import Store
from madkernels.synthetics.train import Diverged, build, train


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


def sweep(runs: Sequence[Run], store: Store, progress: Progress, *, workers: int = 1) -> Outcome:
    """Trains what is not done yet. A run that diverges is kept as failed, and the sweep goes on.

    Raises:
        ValueError: an architecture does not go with the width; before anything is trained.
    """
    done = store.metrics()
    todo = [run for run in runs if run.key() not in done]
    for run in {(r.arch, r.task.autoencoder, r.training.dim): r for r in todo}.values():
        build(run)
    sweeper = _Sweeper(store, progress)
    if workers > 1 and len(todo) > 1:
        _in_pool(todo, sweeper, min(workers, len(todo)))
    else:
        _in_this_process(todo, sweeper)
    return Outcome(len(todo) - sweeper.failed, len(runs) - len(todo), sweeper.failed)


class _Sweeper:
    """Keeps the books: every change of a run goes to the store, then to the progress."""

    def __init__(self, store: Store, progress: Progress) -> None:
        self.store, self.progress, self.failed = store, progress, 0

    def start(self, run: Run) -> None:
        self.store.start(run)
        self.progress.run_starts(run)

    def end(self, run: Run, result: Callable[[], dict[str, Any]]) -> None:
        try:
            measured = result()
        except Diverged as error:
            self.failed += 1
            self.store.fail(run, str(error))
            self.progress.run_ends(run, f"failed: {error}")
        else:
            self.store.finish(run, measured)
            self.progress.run_ends(run, f"accuracy {measured['accuracy']:.3f} in {measured['seconds']:.0f} s")


def _in_this_process(todo: Sequence[Run], sweeper: _Sweeper) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in todo:
            sweeper.start(run)

            def tell(epoch: int, point: dict[str, float], run: Run = run) -> None:
                sweeper.progress.epoch_ends(run, epoch, point)

            sweeper.end(run, lambda run=run, tell=tell: train(run, tell))  # type: ignore[misc]
    finally:
        torch.set_num_threads(threads)


def _in_pool(todo: Sequence[Run], sweeper: _Sweeper, workers: int) -> None:
    """The parent alone writes to the store; workers tell their epochs through a queue."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    waiting = list(reversed(todo))
    running: dict[Future[dict[str, Any]], Run] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(told,)) as pool:
        while waiting or running:
            while waiting and len(running) < workers:
                run = waiting.pop()
                sweeper.start(run)
                running[pool.submit(_train_in_worker, run)] = run
            ended, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            while not told.empty():
                sweeper.progress.epoch_ends(*told.get())
            for future in ended:
                sweeper.end(running.pop(future), future.result)


_told: Any = None  # in a worker: the queue to its parent


def _start_worker(told: Any) -> None:
    global _told
    _told = told
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes nothing, so its workers look after it themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_in_worker(run: Run) -> dict[str, Any]:
    return train(run, lambda epoch, point: _told.put((run, epoch, point)))
