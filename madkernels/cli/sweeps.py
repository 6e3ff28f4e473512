"""What the commands that do many runs share: where they are done, and how far they are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:  # torch is loaded when a command runs, not to print its help
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from madkernels.runs.engines import Engine, Run
    from madkernels.runs.store import Store


def load_plugins(paths: list[Path] | None) -> list[str]:
    from madkernels.runs.engines import load_plugin

    found = [str(path.resolve()) for path in paths or []]
    for path in found:
        load_plugin(path)
    return found


def engine_of(
    name: Literal["pool", "process", "ray"], workers: int | None, address: str, device: str, plugins: list[str]
) -> Engine:
    import torch

    from madkernels.cli.device import check_device
    from madkernels.runs.engines import InProcess, Pool, RayCluster
    from madkernels.runs.memory import keep_freed_memory

    check_device(device, numbered=False)
    if name == "process":
        keep_freed_memory()
        return InProcess(device)
    if name == "ray":
        return RayCluster(address, device, plugins)
    return Pool(workers or (torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1), device, plugins)


def announce(work: Mapping[Any, float], done: Collection[str], place: Engine) -> None:
    """Says how much there is to do: runs, tokens, FLOPs, and the time where they are trained on this CPU.

    Args:
        work: FLOPs of each run.
        done: keys of runs that are done.
    """
    from madkernels.runs.engines import InProcess, Pool
    from madkernels.runs.pace import amount

    left = {run: flops for run, flops in work.items() if run.key() not in done}
    if len(left) < len(work):
        print(f"going on: {len(work) - len(left)} of {len(work)} runs are done", flush=True)
    if not left:
        return
    workers = None
    if isinstance(place, InProcess | Pool) and place.device == "cpu":
        workers = min(place.workers if isinstance(place, Pool) else 1, os.cpu_count() or 1)
    print(f"{len(left)} runs to do: {amount(left, workers)}", flush=True)


def done_in(folder: Path) -> Collection[str]:
    """The keys of the runs that are done in a folder, which need not be there."""
    from madkernels.runs.store import FILE, Results

    if not (folder / FILE).is_file():
        return ()
    with closing(Results(folder)) as results:
        return results.metrics().keys()


@contextmanager
def stoppable(store: Store, runs: Collection[Run] | None = None) -> Iterator[None]:
    """SIGINT and SIGTERM end what runs inside with exit code 130 and one line, which says how many of the runs, or of all
    that the store has, are done."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped: {_done(store, runs)}; the same command goes on", flush=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _done(store: Store, runs: Collection[Run] | None) -> str:
    known = store.metrics().keys()
    if runs is None:
        return f"{len(known)} runs are done"
    return f"{len({run.key() for run in runs} & known)} of {len(runs)} runs are done"


def progress_bars(console: Console) -> Progress:
    """Bars that fit 80 columns: what is not a name or a bar is shown whole, names take what is left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
    from rich.table import Column
    from rich.text import Text

    from madkernels.runs.pace import duration

    class TimeLeft(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            left = task.time_remaining
            return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")

    class Count(MofNCompleteColumn):
        """Of runs, or of the steps of one."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["count"], style="progress.download") if "count" in task.fields else super().render(task)

    return Progress(
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        Count(),
        TextColumn("{task.fields[note]}"),
        TimeLeft(),
        console=console,
        expand=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )


def note(point: Mapping[str, float], room: int | None = None) -> str:
    """The figures of a point, the loss first; those for which there is room, in characters, or all."""
    told = ""
    for name, value in point.items():
        shown = _rate(value) if name == "tokens_per_second" else f"{name.replace('_', ' ')} {value:.4g}"
        longer = f"{told}, {shown}" if told else shown
        if told and room is not None and len(longer) > room:
            break
        told = longer
    return told


def _rate(tokens_per_second: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if tokens_per_second >= size:
            return f"{tokens_per_second / size:.3g}{unit} tok/s"
    return f"{tokens_per_second:.3g} tok/s"


class Bars:
    """A sweep's progress: a bar for all its work, one for each run under way. Where no terminal is: a line a
    run."""

    def __init__(self, bars: Progress, work: Mapping[Any, float], done: Collection[Any], name: str = "all runs") -> None:
        self.bars, self.work, self.done = bars, work, len(done)
        self.finished = self.before = sum(work[run] for run in done)  # FLOPs
        self.begun = time.monotonic()
        self.all = bars.add_task(name, total=sum(work.values()), completed=int(self.finished), note="", count=self.count())
        self.under_way: dict[Run, TaskID] = {}
        self.parts: dict[Run, float] = {}  # of the work of runs under way

    def count(self) -> str:
        return f"{self.done}/{len(self.work)}"

    def run_starts(self, run: Run) -> None:
        self.parts[run] = 0.0
        if run not in self.under_way:  # else it starts again
            self.under_way[run] = self.bars.add_task(str(run), total=run.points, note="")

    def point(self, run: Run, number: int, point: dict[str, float]) -> None:
        if run in self.under_way:
            room = self.bars.console.width - 80 + 12
            self.bars.update(self.under_way[run], completed=number, note=note(point, room))
            self.parts[run] = number / run.points * self.work[run]
            self.show()

    def run_ends(self, run: Run, outcome: str) -> None:
        self.done += 1
        self.finished += self.work[run]
        self.parts.pop(run, None)
        self.show()
        if run in self.under_way:
            self.bars.remove_task(self.under_way.pop(run))
        left = f"; {self.left()} left" if self.done < len(self.work) else ""
        line = f"[{self.done}/{len(self.work)}] {run}: {outcome}{left}"
        self.bars.console.print(line, markup=False, soft_wrap=True)

    def show(self) -> None:
        self.bars.update(self.all, completed=self.finished + sum(self.parts.values()), count=self.count())

    def left(self) -> str:
        """The time that is left at the pace so far."""
        from madkernels.runs.pace import duration

        worked = self.finished + sum(self.parts.values()) - self.before
        left = sum(self.work.values()) - self.before - worked
        return duration((time.monotonic() - self.begun) * left / worked)
