"""Where jobs are done: in this process, in a pool of processes, or on a Ray cluster.

A job is one run, or several that train together. Whatever happens to a job is told for each of its runs: an engine raises
for nothing that a job does. A job whose worker dies is done again, twice at most. Workers write nothing: results go to
whoever listens. A KeyboardInterrupt of the caller ends the workers, and passes; a second one ends them at once.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from madkernels.runs.memory import keep_freed_memory

Result = dict[str, Any] | str  # what was measured, or why there is nothing
OnPoint = Callable[[Any, int, dict[str, float]], None]
ATTEMPTS = 3
CONNECT = 30.0  # seconds that a Ray cluster gets to answer
GRACE = 60.0  # seconds that workers get to save what they are at


class Run(Protocol):
    """One training: frozen, hashable, and small enough to be sent to a worker."""

    def __str__(self) -> str:
        """A few words for who looks on."""
        ...

    @property
    def points(self) -> int:
        """How many points its curve gets at most."""
        ...

    @property
    def tokens(self) -> float:
        """Tokens that are trained on at most."""
        ...

    def trial(self, dearest: float) -> Callable[[], float] | None:
        """A model like this run's: each call does an optimizer step on the CPU, or as much of one as costs no more than
        `dearest` FLOPs, and returns its FLOPs. None where one sequence would be more."""
        ...

    def config(self) -> dict[str, Any]:
        """All that the result depends on, as JSON; a changed option is another run."""
        ...

    def key(self) -> str:
        """A hash of `config`."""
        ...

    @staticmethod
    def do(job: Any, on_point: OnPoint, device: str) -> list[Result]:
        """Trains runs of this kind, together where they are several; may raise."""
        ...


class Refused(Exception):
    """A run gets no result; the message says why."""


class Diverged(Refused):
    """The loss is no number any more."""


Job = tuple[Run, ...]


class Listener(Protocol):
    """What an engine tells."""

    def started(self, run: Any) -> None: ...
    def point(self, run: Any, number: int, point: dict[str, float]) -> None: ...
    def ended(self, run: Any, result: Result) -> None: ...


class Engine(Protocol):
    """Does jobs in their order, as far as it does them one after the other."""

    def run(self, jobs: Sequence[Job], listener: Listener) -> None: ...


def work(job: Job, on_point: OnPoint, device: str) -> list[Result]:
    """Trains the runs of a job. An error is their result."""
    try:
        return job[0].do(job, on_point, device)
    except Refused as error:
        return [str(error)] * len(job)
    except Exception as error:  # whatever one trial meets, the others go on
        return [f"{type(error).__name__}: {error}"] * len(job)


def load_plugin(path: str) -> None:
    """Runs a Python file that adds layers or tasks. ValueError where it cannot."""
    name = f"madkernels_plugin_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"plugin {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"plugin {path}: {type(error).__name__}: {error}") from None


@dataclass
class InProcess:
    """One job after the other, here."""

    device: str = "cpu"

    def run(self, jobs: Sequence[Job], listener: Listener) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so that a result does not depend on where it was made
        try:
            for job in jobs:
                for run in job:
                    listener.started(run)
                for run, result in zip(job, work(job, listener.point, self.device), strict=True):
                    listener.ended(run, result)
        finally:
            torch.set_num_threads(threads)


# ---- a pool of processes


@dataclass
class Pool:
    """Processes of one thread each: small models gain more from jobs side by side than from threads."""

    workers: int
    device: str = "cpu"
    plugins: Sequence[str] = ()

    def run(self, jobs: Sequence[Job], listener: Listener) -> None:
        waiting = deque(_Attempt(job) for job in jobs)
        workers = [self.worker(place) for place in range(min(self.workers, len(jobs)))]
        try:
            for worker in workers:
                _give(worker, waiting, listener)
            while any(worker.attempt for worker in workers):
                wait([handle for worker in workers if worker.attempt for handle in worker.handles()])
                for place, worker in enumerate(workers):
                    if worker.listen(listener):
                        _give(worker, waiting, listener)
                    elif not worker.process.is_alive():
                        if worker.attempt:
                            _try_again(worker.attempt, waiting, listener)
                        workers[place] = self.worker(place)
                        _give(workers[place], waiting, listener)
        except KeyboardInterrupt:
            _end(workers, listener)
            raise
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()

    def worker(self, place: int) -> _Worker:
        """Each has a GPU of its own, as far as there are."""
        device = f"cuda:{place % torch.cuda.device_count()}" if self.device == "cuda" else self.device
        return _Worker(device, self.plugins)


@dataclass
class _Attempt:
    job: Job
    number: int = 1


def _give(worker: _Worker, waiting: deque[_Attempt], listener: Listener) -> None:
    worker.attempt = waiting.popleft() if waiting else None
    if worker.attempt is None:
        return
    for run in worker.attempt.job:
        listener.started(run)
    try:
        worker.pipe.send(worker.attempt.job)
    except OSError:  # it died; the next look at it says so
        return


def _try_again(attempt: _Attempt, waiting: deque[_Attempt], listener: Listener) -> None:
    if attempt.number < ATTEMPTS:
        waiting.appendleft(_Attempt(attempt.job, attempt.number + 1))
        return
    for run in attempt.job:
        listener.ended(run, f"its worker died {ATTEMPTS} times")


def _end(workers: Sequence[_Worker], listener: Listener) -> None:
    """Asks workers to end: a trainer that saves does so first. Passes on what they still said."""
    for worker in workers:
        worker.process.terminate()
    until = time.monotonic() + GRACE
    for worker in workers:
        worker.process.join(max(until - time.monotonic(), 0))
        worker.listen(listener)


class _Worker:
    """A process, and the job that it is at."""

    def __init__(self, device: str, plugins: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, device, tuple(plugins)), daemon=True)
        resource_tracker.ensure_running()  # which unblocks SIGINT: not between here and the worker's start
        # Ctrl-C reaches every process of a terminal; workers, which begin with it blocked, leave it to their parent.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.attempt: _Attempt | None = None

    def handles(self) -> list[Any]:
        return [self.pipe, self.process.sentinel]

    def listen(self, listener: Listener) -> bool:
        """Passes on what it has said; whether its job has ended."""
        try:
            while self.attempt and self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, list):
                    for run, result in zip(self.attempt.job, message, strict=True):
                        listener.ended(run, result)
                    return True
                listener.point(*message)
        except (EOFError, OSError):
            self.process.join(timeout=10)  # it has closed its end, so it is ending
        return False


def _serve(pipe: Connection, device: str, plugins: Sequence[str]) -> None:
    """What a worker does: jobs, until its parent is gone."""
    torch.set_num_threads(1)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for path in plugins:
        load_plugin(path)
    while True:
        try:
            job = pipe.recv()
            pipe.send(work(job, lambda *point: pipe.send(point), device))
        except (EOFError, KeyboardInterrupt):  # the parent is gone, or has asked for the end and the trainer has saved
            return


def _end_with_parent() -> None:
    """A killed parent closes nothing, so its workers look after it themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ---- Ray


@dataclass
class RayCluster:
    """A Ray cluster that is running, as by ``ray start --head``: one CPU (or GPU) a job, and as many at once as it has.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at the address.
    """

    address: str = "auto"
    device: str = "cpu"
    plugins: Sequence[str] = ()
    _ray: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError("Ray is not installed: pip install 'madkernels[cluster]'") from None
        self._ray = ray
        if not ray.is_initialized():
            self._check_port()
            self._connect()

    def _refusal(self, why: object) -> ValueError:
        address, known = os.environ.get("RAY_ADDRESS") or self.address, ""
        if address == "auto":
            left = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")
            known = f" ({left.read_text().strip()}, as {left} says)" if left.exists() else ""
        advice = (
            "start one with: ray start --head, or give the --address of one that runs; ray stop forgets one that is gone"
        )
        return ValueError(f"no Ray cluster at {address}{known}: {why}; {advice}")

    def _check_port(self) -> None:
        """Says at once that nothing listens at an address; Ray itself would try for minutes."""
        host, _, port = (os.environ.get("RAY_ADDRESS") or self.address).rpartition(":")
        if not host or not port.isdecimal() or "://" in host:
            return
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise self._refusal(error) from None

    def _connect(self) -> None:
        """Connects in a thread of its own, since nothing else ends a wait for a cluster that is gone."""
        errors: list[Exception] = []

        def connect() -> None:
            try:
                self._ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # told below
                errors.append(error)

        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(CONNECT)
        if thread.is_alive():
            raise self._refusal(f"no answer within {CONNECT:.0f} s")
        if errors:
            raise self._refusal(" ".join(str(errors[0]).split()))

    def run(self, jobs: Sequence[Job], listener: Listener) -> None:
        from ray.util.queue import Queue

        said = Queue()
        needs = {"num_gpus": 1} if self.device.startswith("cuda") else {"num_cpus": 1}
        task = self._ray.remote(max_retries=ATTEMPTS - 1, **needs)(_work_on_ray)
        waiting = {task.remote(job, said, self.device, tuple(self.plugins)): job for job in jobs}
        try:
            while waiting:
                ended, _ = self._ray.wait(list(waiting), timeout=0.5)
                self._pass_on(said, listener)
                for reference in ended:
                    job = waiting.pop(reference)
                    for run, result in zip(job, self._result(reference, job), strict=True):
                        listener.ended(run, result)
        except KeyboardInterrupt:
            self._cancel(list(waiting))
            raise
        finally:
            said.shutdown(force=True)

    def _cancel(self, tasks: list[Any]) -> None:
        """Interrupts tasks, which lets a trainer save, and ends those that do not end by themselves."""
        for force in (False, True):
            for task in tasks:
                self._ray.cancel(task, force=force)
            _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=GRACE) if tasks else ([], [])

    def _pass_on(self, said: Any, listener: Listener) -> None:
        for run, number, point in said.get_nowait_batch(said.qsize()):
            listener.point(run, number, point) if number else listener.started(run)

    def _result(self, reference: Any, job: Job) -> list[Result]:
        try:
            results: list[Result] = self._ray.get(reference)
            return results
        except self._ray.exceptions.RayError as error:
            return [f"{type(error).__name__}: its worker died {ATTEMPTS} times"] * len(job)


def _work_on_ray(job: Job, said: Any, device: str, plugins: Sequence[str]) -> list[Result]:
    torch.set_num_threads(1)
    keep_freed_memory()
    for path in plugins:
        load_plugin(path)
    for run in job:
        said.put((run, 0, {}))
    return work(job, lambda *point: said.put(point), device)
