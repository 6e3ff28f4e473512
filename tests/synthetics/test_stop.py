"""Sweeps that are asked to end: one line, exit code 130, no process left, and the same command goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.runs import engines

TRAINING = {"lr": [1e-3], "weight_decay": [0.0], "batch": 8, "dim": 16, "held_out": 8, "enough": 2.0}
TASK = {"baseline": {"vocab_size": 8, "seqlen": 8, "train_examples": 8}, "changes": {"seqlen": [10]}}
ENDLESS = 100_000
# A worker that takes its time to save; it says when it is ready to.
SLOW = """
import multiprocessing, signal, time
from pathlib import Path
if multiprocessing.parent_process():
    signal.signal(signal.SIGTERM, lambda *_: time.sleep(50))
    Path({ready!r}).touch()
"""


def arguments(folder: Path, epochs: int, *options: str) -> list[str]:
    """`mad run` of two runs, each of so many epochs."""
    protocol = {
        "about": "",
        "score": "accuracy",
        "seeds": [1],
        "training": TRAINING | {"epochs": epochs},
        "tasks": {"recall": TASK},
    }
    (folder / "mine.json").write_text(json.dumps(protocol))
    arch = "attention:heads=2 mlp"
    return ["mad", "run", "--arch", arch, "--protocol", str(folder / "mine.json"), "--out", str(folder / "out"), *options]


def start(*command: str) -> subprocess.Popen[str]:
    """In a session of its own."""
    whole = [sys.executable, "-m", "madkernels.cli", *command]
    return subprocess.Popen(whole, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes(session: int) -> list[int]:
    """Those of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == session and state != "Z":
            found.append(int(folder.name))
    return found


def statuses(folder: Path) -> dict[str, str]:
    """What `mad status` says of runs that are not done, by status."""
    told = CliRunner().invoke(app, ["mad", "status", "--out", str(folder / "out")]).output
    return {status: count for count, status in re.findall(r", (\d+) (\w+)", told.partition("\n")[0])}


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_in_one_line(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C goes to all processes of a terminal, what a scheduler sends to the first only."""
    process = start(*arguments(tmp_path, ENDLESS, "--workers", "2"))
    until(lambda: statuses(tmp_path).get("running") == "2")
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert told.count("\n") == 2, told
    first, last = told.splitlines()
    assert first.startswith("2 runs to do: ")
    assert last == "stopped: 0 of 2 runs are done; the same command goes on"
    until(lambda: not processes(process.pid), 10)
    assert statuses(tmp_path) == {"stopped": "2"}


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    plugin, ready = tmp_path / "slow.py", tmp_path / "ready"
    plugin.write_text(SLOW.format(ready=str(ready)))
    process = start(*arguments(tmp_path, ENDLESS, "--workers", "1", "--plugin", str(plugin)))
    until(ready.exists)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for its worker
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=10)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    until(lambda: not processes(process.pid), 10)


def test_what_was_done_is_kept_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the second run asks it to end."""
    honest, jobs = engines.work, 0

    def asks(*job: Any) -> Any:
        nonlocal jobs
        jobs += 1
        if jobs == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*job)

    monkeypatch.setattr(engines, "work", asks)
    before = signal.getsignal(signal.SIGTERM)
    for code, first, last in (
        (130, "2 runs to do: ", "stopped: 1 of 2 runs are done; the same command goes on"),
        (0, "going on: 1 of 2 runs are done", "1 runs trained, 1 found done, 0 failed."),
    ):
        result = CliRunner().invoke(app, arguments(tmp_path, 1, "--engine", "process"), env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        assert result.output.startswith(first)
        assert last in result.output
    assert signal.getsignal(signal.SIGTERM) is before
