"""How far runs are, on the terminal."""

from __future__ import annotations

import io
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from live_runs import language_run, result, runs, training, under_way
from rich.console import Console
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.live import terminal
from madkernels.live.watched import Cell, Effort, Watched, seconds_left
from madkernels.runs.store import Store


def status(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["status", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def cells(text: str) -> list[list[str]]:
    """The rows of a table, the lines of a cell as one."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith(("│", "┃")):
            parts = [part.strip() for part in re.split("[│┃]", line)[1:-1]]
            if parts[0] or not found:
                found.append(parts)
            else:
                found[-1] = [f"{old} {new}".strip() for old, new in zip(found[-1], parts, strict=True)]
    return found


def test_a_living_sweep_runs_and_a_dead_one_has_stopped(tmp_path: Path) -> None:
    store = under_way(tmp_path)
    live = status(str(tmp_path))
    store.close()
    dead = status(str(tmp_path))
    assert live.startswith(f"{tmp_path}: 5 of 8 runs are done, 1 running, 1 failed")
    assert dead.startswith(f"{tmp_path}: 5 of 8 runs are done, 1 failed, 1 stopped")
    told = {name: row for name, *row in cells(live)}
    assert told["attention:heads=2 mlp"] == ["2/2", "2/2"]
    assert told["mamba mlp"] == ["1/2 1 failed", "0/2 1 running"]
    assert "failed: compression" not in live
    assert "- failed: recall: mamba mlp: the loss is nan <b>" in live


def test_mad_status_says_the_same(tmp_path: Path) -> None:
    under_way(tmp_path).close()
    done = CliRunner().invoke(app, ["mad", "status", "--out", str(tmp_path)])
    assert done.output == status(str(tmp_path))


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_nothing_is_cut(columns: int, tmp_path: Path) -> None:
    under_way(tmp_path).close()
    console = Console(width=columns, force_terminal=True, file=io.StringIO(), record=True)
    terminal.show(Watched(tmp_path), console)
    told = console.export_text()
    assert "…" not in told
    assert max(len(line) for line in told.splitlines() if line[:1] in "│┃┏└") <= columns
    for word in ("recall", "compression", "attention:heads=2", "1/2", "1 stopped"):
        assert word in told


def test_a_scaling_sweep_and_a_training(tmp_path: Path) -> None:
    store = Store(tmp_path / "sweep")
    store.plan([language_run()])
    store.start(language_run())
    training(tmp_path / "training")
    told = status(str(tmp_path))
    store.close()
    assert "sweep: 0 of 1 runs are done, 1 running" in told
    assert "step 0 of 10" in told
    assert "training: stopped: step 3 of 4 (75%), loss 1.6667; about 1 s left" in told


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert done.exit_code != 0
    assert isinstance(done.exception, ValueError)
    assert "there are no results in" in str(done.exception)


def test_a_watch_in_a_pipe_says_each_change_once(tmp_path: Path) -> None:
    store, out = under_way(tmp_path), io.StringIO()
    watched = Watched(tmp_path)
    thread = threading.Thread(target=terminal.watch, args=([watched], Console(file=out), 0.02))
    thread.start()
    for number, run in enumerate(runs()[6:], 6):
        deadline = time.monotonic() + 30
        while f"{number - 1} of 8" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        store.finish(run, result(run))
    time.sleep(0.1)
    store.close()
    thread.join(30)
    assert not thread.is_alive(), "nothing runs any more"
    lines = re.findall(r"^[\d:]{8} (\d of 8) runs are done", out.getvalue(), re.MULTILINE)
    assert lines == ["5 of 8", "6 of 8", "7 of 8"]


def test_the_time_left_is_that_of_the_hours_at_work() -> None:
    night = [Effort(100.0, 100.0, (0.0, 10.0)), Effort(100.0, 100.0, (5.0, 20.0)), Effort(100.0, 100.0, (80000.0, 80010.0))]
    assert seconds_left([*night, Effort(60.0)]) == pytest.approx(60 * 30 / 300)
    assert seconds_left([Effort(100.0, 50.0, (0.0, 10.0))]) == pytest.approx(10.0)
    assert seconds_left(night) is None
    assert seconds_left([Effort(60.0)]) is None


def test_a_cell_names_what_is_odd_alone() -> None:
    assert Cell(Counter(done=3)).lines() == ["3/3"]
    assert Cell(Counter(done=1, planned=2, failed=1)).lines() == ["1/4", "1 failed"]
