"""`madkernels mad`: score architectures on the MAD tasks, and look at the tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # torch is loaded when a command runs, not to print its help
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from madkernels.synthetics.protocol import Run
    from madkernels.synthetics.tasks import Task

mad = typer.Typer(help="Score architectures on the MAD capability tasks.", no_args_is_help=True)

DEMO_ARCHS = ("mamba:dstate=4 swiglu mamba:dstate=4 swiglu", "mamba:dstate=4 swiglu attention:heads=4 swiglu")
COLOURS = ("cyan", "green", "bright_black", "magenta")


@mad.command()
def run(
    arch: Annotated[list[str] | None, typer.Option(help='Such as "mamba swiglu attention swiglu"; give several.')] = None,
    tasks: Annotated[str, typer.Option(help="Names with commas between, or all.")] = "all",
    preset: Annotated[str, typer.Option(help="demo (minutes) or paper (66 settings, 6 optimiser settings).")] = "demo",
    out: Annotated[Path, typer.Option(help="Folder of the results; a run found there is not done again.")] = Path("out/mad"),
    seed: Annotated[int | None, typer.Option(help="Of data, order and initialisation.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side, of one thread each; as many as cores.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the preset's choice if absent.")] = None,
) -> None:
    """Train every architecture on every task, and print their scores.

    Without --arch the demo preset compares a pure recurrence with a hybrid that has one attention layer.
    """
    from rich.console import Console

    from madkernels.synthetics.protocol import plan
    from madkernels.synthetics.report import table, write_csv
    from madkernels.synthetics.store import Store
    from madkernels.synthetics.sweep import sweep

    if not arch and preset != "demo":
        raise ValueError(f'the {preset} preset needs an architecture: --arch "mamba swiglu attention swiglu"')
    runs = plan(preset, arch or DEMO_ARCHS, tasks, seed=seed, dtype=dtype)
    console = Console()
    store = Store(out)
    with _progress(console) as bars:
        done = len(store.metrics().keys() & {run.key() for run in runs})
        outcome = sweep(runs, store, Bars(bars, len(runs), done), workers=workers or os.cpu_count() or 1)
    scores_path, runs_path = write_csv(runs, store, out)
    console.print(table(runs, store))
    console.print(f"{outcome.trained} runs trained, {outcome.already_done} found done, {outcome.failed} failed.")
    console.print(f"Results: {store.path}, {scores_path}, {runs_path}", soft_wrap=True)
    store.close()


@mad.command("tasks")
def show_tasks(
    name: Annotated[str | None, typer.Argument(help="One task; all of them if absent.")] = None,
    preset: Annotated[str, typer.Option(help="Whose baseline settings are shown.")] = "demo",
    count: Annotated[int, typer.Option(min=1, help="Sequences of each task.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the sequences.")] = 12345,
) -> None:
    """Show what the tasks look like: a few test sequences, tokens coloured by role, what is to be answered below them."""
    from rich.console import Console

    from madkernels.synthetics.protocol import PRESETS, task_names

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    console = Console(soft_wrap=True)
    for task_name in task_names(name or "all"):
        _show(console, PRESETS[preset].settings[task_name][0], count, seed)


def _show(console: Console, task: Task, count: int, seed: int) -> None:
    from rich.text import Text

    console.print(Text(task.name, style="bold") + Text(f": {task.summary}"))
    legend = [Text(f"{role} {_span(ids)}", style=c) for c, (role, ids) in zip(COLOURS, task.roles().items(), strict=False)]
    console.print(Text("  ") + Text(", ").join(legend))
    for inputs, targets in zip(*task.generate(count, seed=seed, split="test"), strict=True):
        for line in _rows(task, inputs.tolist(), targets.tolist(), console.width):
            console.print(line)
        console.print()


def _span(ids: range) -> str:
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]}-{ids[-1]}"


def _rows(task: Task, inputs: list[int], targets: list[int], width: int) -> list[Text]:
    """Tokens and, under them, the answers; broken into lines of the console's width."""
    from rich.text import Text

    from madkernels.synthetics.tasks import IGNORE

    cell = len(str(task.vocab_size - 1)) + 1
    per_line = max((width - 10) // cell, 1)
    lines = []
    for begin in range(0, len(inputs), per_line):
        part = slice(begin, begin + per_line)
        shown = Text("  input  ")
        for token in inputs[part]:
            shown.append(f"{token:>{cell}}", style=_colour(task, token))
        answers = Text("  answer ")
        for token in targets[part]:
            answers.append(" " * cell if token == IGNORE else f"{token:>{cell}}", style="bold yellow")
        lines += [shown, answers] if answers.plain.strip() != "answer" else [shown]
    return lines


def _colour(task: Task, token: int) -> str:
    return next(colour for colour, ids in zip(COLOURS, task.roles().values(), strict=False) if token in ids)


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class Bars:
    """A sweep's progress: a bar for all runs, one for the epochs of each under way. Where no terminal is: a line a run."""

    def __init__(self, bars: Progress, runs: int, done: int) -> None:
        self.bars, self.runs, self.done = bars, runs, done
        self.all = bars.add_task("all runs", total=runs, completed=done, note="")
        self.under_way: dict[str, TaskID] = {}

    def run_starts(self, run: Run) -> None:
        name = f"{run.task.name}: {run.arch}"
        self.under_way[run.key()] = self.bars.add_task(name, total=run.training.epochs, note="")

    def epoch_ends(self, run: Run, epoch: int, point: dict[str, float]) -> None:
        note = f"loss {point['loss']:.3f}, validation {100 * point['validation_accuracy']:.1f} %"
        if run.key() in self.under_way:
            self.bars.update(self.under_way[run.key()], completed=epoch, note=note)

    def run_ends(self, run: Run, outcome: str) -> None:
        self.done += 1
        self.bars.update(self.all, advance=1)
        self.bars.remove_task(self.under_way.pop(run.key()))
        self.bars.console.print(
            f"[{self.done}/{self.runs}] {run.task.name}: {run.arch}: {outcome}", markup=False, soft_wrap=True
        )
