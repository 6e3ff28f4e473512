"""The runs of a plan on an engine, into a folder: results as SQLite and CSV, a log and a checkpoint per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from madkernels.files import write_whole
from madkernels.runs.engines import Engine
from madkernels.runs.execute import Outcome, Progress, execute, left
from madkernels.runs.store import Results, Store
from madkernels.scaling.fits.runs_table import csv_text
from madkernels.scaling.plan import Planned
from madkernels.scaling.training.data import Corpus
from madkernels.scaling.training.recipe import LMRun

CSV = "runs.csv"
MEASURED = ("loss", "train_loss", "seconds", "left_out")


def runs_of(rows: Sequence[Planned], data: Path, out: Path) -> list[LMRun]:
    """The trainings of a plan. ValueError where its vocabulary is not that of the data."""
    corpus = Corpus(data)
    if other := {row.vocab_size for row in rows} - {corpus.vocab_size}:
        raise ValueError(f"the plan is for a vocabulary of {', '.join(map(str, other))}; {data} has {corpus.vocab_size}")
    runs = [row.run(corpus.sha256, str(data.resolve())) for row in rows]
    return [replace(run, out=str(folder_of(run, out).resolve())) for run in runs]


def folder_of(run: LMRun, out: Path) -> Path:
    """Where a run of a sweep has its log and its checkpoints."""
    return out / "runs" / run.key()[:16]


def sweep(runs: Sequence[LMRun], work: dict[LMRun, float], store: Store, progress: Progress, engine: Engine) -> Outcome:
    """Trains what is not done yet, the longest first. A run that fails is kept as failed, and the sweep goes on.

    Args:
        runs: of a plan.
        work: FLOPs that each takes.

    Raises:
        OSError: results could not be written to the end; those that could are kept.
    """
    todo = sorted(left(runs, store), key=lambda run: -work[run])
    return execute(runs, [(run,) for run in todo], store, progress, engine, _summarise)


def _summarise(result: dict[str, Any]) -> str:
    return f"loss {result['loss']:.3f} in {result['seconds']:.0f} s"


def write_csv(rows: Sequence[Planned], runs: Sequence[LMRun], results: Results, path: Path) -> None:
    """One line per run of the plan: the plan's columns, what was measured, and the status."""
    found = {row["key"]: row for row in results.rows()}
    lines = []
    for row, run in zip(rows, runs, strict=True):
        result = found[run.key()]
        measured = {name: (result["metrics"] or {}).get(name) for name in MEASURED}
        lines.append(asdict(row) | measured | {"status": result["status"]})
    write_whole(path, csv_text([*(f.name for f in fields(Planned)), *MEASURED, "status"], lines))
