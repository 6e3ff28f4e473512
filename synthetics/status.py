"""How far a sweep is, from its results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from madkernels.runs.pace import duration
from madkernels.runs.store import OPEN
from madkernels.synthetics.sweep import work_of


@dataclass(frozen=True)
class Summary:
    """Runs by task and architecture and status, and what else is to be said."""

    counts: dict[tuple[str, str], Counter[str]]
    lines: list[str]


def summary(rows: Sequence[dict[str, Any]]) -> Summary:
    """The state of a sweep, from the rows of its results file."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        counts.setdefault((row["run"].task.name, row["run"].arch), Counter())[row["status"]] += 1
    total = sum(counts.values(), Counter[str]())
    lines = [f"{total['done']} of {len(rows)} runs are done" + (f", {total['failed']} failed" if total["failed"] else "")]
    if left := time_left(rows):
        lines.append(f"about {duration(left)} left at the pace so far")
    lines += [f"failed: {row['run'].task}: {row['run'].arch}: {row['error']}" for row in rows if row["status"] == "failed"]
    return Summary(counts, lines)


def time_left(rows: Sequence[dict[str, Any]]) -> float | None:
    """Seconds, from the FLOPs that are left and the pace of the runs done; None without both. Early stops are foreseen
    as often as they came so far."""
    done = [row for row in rows if row["status"] == "done" and row["ended"] > row["started"]]
    left = [row for row in rows if row["status"] in OPEN]
    if not done or not left:
        return None
    try:
        work = work_of([row["run"] for row in rows])
    except ValueError:  # a layer from outside that is not here
        return None
    elapsed = max(row["ended"] for row in done) - min(row["started"] for row in done)
    pace: float = sum(work[row["run"]] for row in done) / elapsed
    return sum(work[row["run"]] for row in left) / pace
