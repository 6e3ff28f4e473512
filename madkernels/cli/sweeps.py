"""What the commands that do many runs share: where they are done, and how far they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # torch is loaded when a command runs, not to print its help
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from madkernels.runs.engines import Engine, Run
    from madkernels.runs.store import Store

Results = Annotated[Path, typer.Option(help="Folder of the results; a run found there is not done again.")]
EngineName = Annotated[
    str, typer.Option(help="Where runs are trained: pool (processes here), process (this one) or ray (a cluster).")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes of the pool. Default: one per core or, with --device cuda, per GPU.")
]
Address = Annotated[str, typer.Option(help="Address of the Ray cluster, with --engine ray.")]
Device = Annotated[str, typer.Option(help="Device to train on: cpu or cuda.")]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file that adds layers or tasks. Repeat for several.")
]


def load_plugins(paths: list[Path] | None) -> list[str]:
    from madkernels.runs.engines import load_plugin

    found = [str(path.resolve()) for path in paths or []]
    for path in found:
        load_plugin(path)
    return found


def engine_of(name: str, workers: int | None, address: str, device: str, plugins: list[str]) -> Engine:
    import torch

    from madkernels.cli.device import check_device
    from madkernels.runs.engines import InProcess, Pool, RayCluster

    check_device(device, numbered=False)
    if name == "process":
        return InProcess(device)
    if name == "ray":
        return RayCluster(address, device, plugins)
    if name != "pool":
        raise ValueError(f"--engine: {name!r} is not known; expected pool, process or ray")
    return Pool(workers or (torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1), device, plugins)


@contextmanager
def stoppable(store: Store, runs: Collection[Run] | None = None) -> Iterator[None]:
    """Says first how much is done, of the runs or of all that the store has. SIGINT and SIGTERM end what runs inside with
    one line and exit code 130."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    done, told = _done(store, runs)
    if done:
        print(f"going on: {told}", flush=True)
    elif runs is not None:
        print(f"{len(runs)} runs to do", flush=True)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped: {_done(store, runs)[1]}; the same command goes on", flush=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _done(store: Store, runs: Collection[Run] | None) -> tuple[int, str]:
    """How many runs are done, and that in words."""
    known = store.metrics().keys()
    if runs is None:
        return len(known), f"{len(known)} runs are done"
    done = len({run.key() for run in runs} & known)
    return done, f"{done} of {len(runs)} runs are done"


def progress_bars(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )


class Bars:
    """A sweep's progress: a bar for all its work, one for each run under way. Where no terminal is: a line a
    run."""

    def __init__(self, bars: Progress, work: Mapping[Any, float], done: Collection[Any], name: str = "all runs") -> None:
        self.bars, self.work, self.done = bars, work, len(done)
        finished = sum(work[run] for run in done)
        self.all = bars.add_task(name, total=sum(work.values()), completed=int(finished), note=self.count())
        self.under_way: dict[Run, TaskID] = {}

    def count(self) -> str:
        return f"{self.done} of {len(self.work)}"

    def run_starts(self, run: Run) -> None:
        if run not in self.under_way:  # else it starts again
            self.under_way[run] = self.bars.add_task(str(run), total=run.points, note="")

    def point(self, run: Run, number: int, point: dict[str, float]) -> None:
        note = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in point.items())
        if run in self.under_way:
            self.bars.update(self.under_way[run], completed=number, note=note)

    def run_ends(self, run: Run, outcome: str) -> None:
        self.done += 1
        self.bars.update(self.all, advance=self.work[run], note=self.count())
        if run in self.under_way:
            self.bars.remove_task(self.under_way.pop(run))
        self.bars.console.print(f"[{self.done}/{len(self.work)}] {run}: {outcome}", markup=False, soft_wrap=True)
