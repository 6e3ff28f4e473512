"""How far a folder of runs is, from what it holds alone: of a MAD sweep, of a scaling sweep, or of one training.

Nothing is written, and a sweep that writes is not waited for longer than SQLite takes to commit a row.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from madkernels.models import counting
from madkernels.models.presets import preset
from madkernels.runs.lock import is_locked
from madkernels.runs.pace import duration
from madkernels.runs.store import FILE, Results
from madkernels.scaling.sweep import folder_of
from madkernels.scaling.training.log import FILE as LOG, Point, points_of
from madkernels.scaling.training.recipe import DEFAULT_SEQLEN, LMRun
from madkernels.scaling.training.trainer import meta_model
from madkernels.synthetics.protocol import Run
from madkernels.synthetics.report import label
from madkernels.synthetics.sweep import work_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Row = dict[str, Any]  # of a results file, with its `run`
MAD, SCALING, TRAINING = "MAD", "scaling", "training"
SHOWN = ("running", "failed", "stopped")  # the statuses that a cell names


@dataclass(frozen=True)
class Cell:
    """Runs of an architecture in a column, by status."""

    counts: Counter[str]

    def lines(self) -> list[str]:
        """As in 3/6 and, where there are some, 2 running."""
        named = [f"{self.counts[status]} {status}" for status in SHOWN if self.counts[status]]
        return [f"{self.counts['done']}/{self.counts.total()}", *named]


@dataclass(frozen=True)
class Seen:
    """A folder at one moment.

    Attributes:
        kind: MAD, SCALING or TRAINING.
        live: whether a living process writes to the folder.
        headline: how far it is, in a line.
        left: seconds at the pace so far, where that is known and something is left.
        cells: by architecture and by task, or by what a scaling plan calls the run; none of a training.
        running: a line for each run under way of which more is known.
        failed: a line for each run that failed.
        rows: of the results file.
        curves: the points so far of each run of the results file, or of the training under its architecture.
    """

    kind: str
    live: bool
    headline: str
    left: float | None
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    curves: Mapping[Any, Sequence[Point]] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The headline, and the time that is left."""
        if self.left is None:
            return self.headline
        return f"{self.headline}; about {duration(self.left)} left at the pace so far"


class Watched:
    """A folder that is looked at again and again; it need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work: dict[Any, float] = {}  # FLOPs of runs that were seen before

    def see(self) -> Seen:
        """The folder as it is now.

        Raises:
            ValueError: it holds no runs, or they cannot be read.
            OSError: nor can the file.
        """
        if not holds_runs(self.folder):
            raise ValueError(f"there are no results in {self.folder}: {FILE} is missing, and {LOG} of a training, too")
        return self._see_sweep() if (self.folder / FILE).exists() else see_training(self.folder)

    def _see_sweep(self) -> Seen:
        live = is_locked(self.folder / FILE)
        with closing(Results(self.folder)) as results:
            rows = results.latest(_run_of)
        scaling = any(isinstance(row["run"], LMRun) for row in rows)
        curves = {row["run"]: row["curve"] or (self._log(row["run"]) if scaling else []) for row in rows}
        cells: dict[tuple[str, str], Counter[str]] = {}
        for row in rows:
            cells.setdefault(place_of(row["run"]), Counter())[row["status"]] += 1
        total = Counter(row["status"] for row in rows)
        named = [f", {total[status]} {status}" for status in SHOWN if total[status]]
        return Seen(
            SCALING if scaling else MAD,
            live,
            f"{total['done']} of {len(rows)} runs are done{''.join(named)}",
            self.time_left(rows, curves),
            {place: Cell(counts) for place, counts in cells.items()},
            [under_way(row["run"], curves[row["run"]]) for row in rows if row["status"] == "running" and scaling],
            [f"failed: {place_of(row['run'])[1]}: {row['run'].arch}: {row['error']}" for row in rows if row["error"]],
            rows,
            curves,
        )

    def _log(self, run: LMRun) -> list[Point]:
        """Of a run that has not ended."""
        return points_of(folder_of(run, self.folder), run.recipe.steps)

    def time_left(self, rows: Sequence[Row], curves: Mapping[Any, Sequence[Point]]) -> float | None:
        """Seconds until what is open is done. Early stops are foreseen as often as they came so far."""
        try:
            self.work |= work_of_runs([row["run"] for row in rows if row["run"] not in self.work])
        except ValueError:  # a layer from outside that is not here
            return None
        return seconds_left([self._effort(row, curves[row["run"]]) for row in rows if row["status"] != "failed"])

    def _effort(self, row: Row, points: Sequence[Point]) -> Effort:
        run, work = row["run"], self.work[row["run"]]
        if row["status"] == "done":
            begun = row["ended"] - row["metrics"]["seconds"]  # one that was resumed began before its last start
            return Effort(work, work, (min(row["started"] or begun, begun), row["ended"]))
        if not points:
            return Effort(work)
        written = (folder_of(run, self.folder) / LOG).stat().st_mtime
        return Effort(work, work * points[-1]["step"] / run.recipe.steps, (written - seconds_of(run, points[-1]), written))


def holds_runs(folder: Path) -> bool:
    return (folder / FILE).exists() or (folder / LOG).exists()


def folders_in(folder: Path) -> list[Path]:
    """The folders of runs: this one, or those directly in it."""
    if holds_runs(folder) or not folder.is_dir():
        return [folder]
    return sorted(inner for inner in folder.iterdir() if holds_runs(inner)) or [folder]


def _run_of(config: dict[str, Any]) -> Run | LMRun:
    return Run.of(config) if "task" in config else LMRun.of(config)


def place_of(run: Run | LMRun) -> tuple[str, str]:
    """The row and the column that a run counts in."""
    if isinstance(run, Run):
        return label(run.arch), run.task.name
    plan = dict(run.plan)
    return (str(plan["architecture"]), f"{plan['kind']} {plan['budget']:.3g}") if plan else (label(run.arch), "runs")


def work_of_runs(runs: Iterable[Run | LMRun]) -> dict[Any, float]:
    """Training FLOPs of each run, at most. ValueError where a layer is not known here."""
    models = list(runs)
    mad = [run for run in models if isinstance(run, Run)]
    return dict[Any, float](work_of(mad)) | {run: flops_of(run) for run in models if isinstance(run, LMRun)}


def flops_of(run: LMRun) -> float:
    return counting.training_flops(meta_model(run), run.recipe.seqlen) * run.tokens


def under_way(run: LMRun, points: Sequence[Point]) -> str:
    step, told = (points[-1]["step"], f", loss {points[-1]['loss']:.4g}") if points else (0, "")
    return f"running: {run}: step {step} of {run.recipe.steps}{told}"


def seconds_of(run: LMRun, point: Point) -> float:
    """How long a training had taken at a point of its log."""
    return point["step"] * run.recipe.batch * run.recipe.seqlen / point["tokens_per_second"]


# ---- the pace


@dataclass(frozen=True)
class Effort:
    """The work of a run, in FLOPs: in all, as far as it is done, and from when to when that was, in seconds since 1970."""

    work: float
    done: float = 0.0
    span: tuple[float, float] | None = None


def seconds_left(efforts: Sequence[Effort]) -> float | None:
    """From the pace of the time in which runs were at work: a night in which nothing ran does not count. None where nothing
    is done yet, or nothing is left."""
    done, left = sum(effort.done for effort in efforts), sum(effort.work - effort.done for effort in efforts)
    busy = _covered([effort.span for effort in efforts if effort.span])
    return left * busy / done if done and left and busy > 0 else None


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in any of the spans."""
    seconds, reached = 0.0, -float("inf")
    for begun, ended in sorted(spans):
        seconds += max(0.0, ended - max(begun, reached))
        reached = max(reached, ended)
    return seconds


# ---- one training


def see_training(folder: Path) -> Seen:
    """The folder of one `train run`, by its log and its recipe."""
    points, recipe = points_of(folder, sys.maxsize), recipe_in(folder)
    step, steps, live = int(points[-1]["step"]) if points else 0, recipe.get("steps", 0), is_locked(folder / LOG)
    state = "running" if live else "done" if steps and step == steps else "stopped"
    of_all = f" of {steps:,} ({step / steps:.0%})" if steps else ""
    known = {name: point[name] for point in points for name in ("loss", "held_out_loss") if name in point}
    figures = [f", {name.replace('_', ' ')} {value:.4f}" for name, value in known.items()]
    name = label(recipe["arch"]) if "arch" in recipe else str(recipe.get("preset", folder.name))
    headline = f"{state}: step {step:,}{of_all}{''.join(figures)}"
    return Seen(TRAINING, live, headline, _training_left(points, recipe), curves={name: points})


def recipe_in(folder: Path) -> dict[str, Any]:
    """The options that the training runs with; none where the file is not there or damaged."""
    try:
        found: dict[str, Any] = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _training_left(points: Sequence[Point], recipe: dict[str, Any]) -> float | None:
    if not points or not {"steps", "batch"} <= recipe.keys():
        return None
    seqlen = recipe.get("seqlen") or (preset(recipe["preset"]).seqlen if "preset" in recipe else DEFAULT_SEQLEN)
    step, tokens = points[-1]["step"], recipe["batch"] * seqlen
    return (recipe["steps"] - step) * tokens / points[-1]["tokens_per_second"] or None
