"""A task from outside goes through every command."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.synthetics import tasks
from madkernels.synthetics.tasks import TASKS, Task, add_task

# Five kinds of token, so more than there are colours, one of no kind, and one kind of no token.
PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from madkernels.synthetics.tasks import Task, add_task

@dataclass(frozen=True)
class Echo(Task):
    name: ClassVar[str] = "echo"
    summary: ClassVar[str] = "say each token again"
    loud: bool = False

    def roles(self):
        return {f"kind{n}": range(n, n + 1) for n in range(5)} | {"none": range(6, 6)}

    def make(self, draws, seed, split):
        inputs = draws.below(self.vocab_size, self.seqlen)
        return inputs, inputs.copy()

add_task(Echo)
"""
TRAINING = {"lr": [1e-2], "weight_decay": [0.0], "epochs": 1, "batch": 16, "dim": 16, "held_out": 16}
SETTING = {"baseline": {"vocab_size": 6, "seqlen": 6, "train_examples": 32}}


def write_protocol(path: Path, tasks: dict[str, Any]) -> None:
    path.write_text(json.dumps({"about": "", "score": "accuracy", "seeds": [1], "training": TRAINING, "tasks": tasks}))


@pytest.fixture(autouse=True)
def only_here() -> Iterator[None]:
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)
    tasks._user.clear()


@pytest.mark.parametrize("beside", [[], ["compression"]])
def test_goes_through_every_command(tmp_path: Path, beside: list[str]) -> None:
    plugin, protocol = tmp_path / "echo.py", tmp_path / "mine.json"
    plugin.write_text(PLUGIN)
    echo = SETTING | {"changes": {"loud": [True]}}
    settings = {"echo": echo} | dict.fromkeys(beside, SETTING)
    write_protocol(protocol, settings)
    archs = ["--arch", "mlp", "--arch", "attention:heads=2 swiglu"]
    out, given = ["--out", str(tmp_path / "out")], ["--plugin", str(plugin)]
    for arguments, said in (
        (["run", "--protocol", str(protocol), "--engine", "process", *archs, *out], f"{4 + 2 * len(beside)} runs trained"),
        (["tasks", "echo", "--protocol", str(protocol)], "kind4 4"),
        (["status", *out], f"{4 + 2 * len(beside)} of {4 + 2 * len(beside)} runs are done"),
        (["compare", *out], "echo"),
        (["report", *out], "report.html"),
    ):
        result = CliRunner().invoke(app, ["mad", *arguments, *given], env={"COLUMNS": "200"})
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        assert said in result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<th scope="col">echo</th>' in page
    assert ("here, 1 task" in page) == bool(beside)
    with (tmp_path / "out" / "results.csv").open() as file:
        assert "echo" in next(csv.reader(file))


def test_a_changed_task_is_another_run(tmp_path: Path) -> None:
    from madkernels.runs.engines import load_plugin
    from madkernels.synthetics.protocol import Run, Training

    keys = []
    for text in (PLUGIN, PLUGIN, PLUGIN.replace("inputs.copy()", "1 * inputs")):
        (tmp_path / "echo.py").write_text(text)
        load_plugin(str(tmp_path / "echo.py"))
        keys.append(Run("mlp", TASKS["echo"](6, 6), Training(lr=1.0)).key())
    assert keys[0] == keys[1] != keys[2]


def test_reaches_the_workers(tmp_path: Path) -> None:
    plugin, protocol = tmp_path / "echo.py", tmp_path / "mine.json"
    plugin.write_text(PLUGIN)
    write_protocol(protocol, {"echo": SETTING})
    command = [sys.executable, "-m", "madkernels.cli", "mad", "run", "--arch", "mlp", "--protocol", str(protocol),
               "--workers", "1", "--plugin", str(plugin), "--out", str(tmp_path / "out")]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert "1 runs trained, 0 found done, 0 failed" in found.stdout


@dataclass(frozen=True)
class Good(Task):
    name: ClassVar[str] = "good"
    summary: ClassVar[str] = "nothing"


@dataclass(frozen=True)
class OfAList(Good):
    sizes: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (dict, "<class 'dict'> is no class derived from Task"),
        (Good(4, 4), "is no class derived from Task"),
        (dataclass(frozen=True)(type("Taken", (Good,), {"name": "recall"})), "there is a task recall already"),
        (dataclass(frozen=True)(type("Odd", (Good,), {"name": "My task"})), "'My task' is no name for a task"),
        (dataclass(frozen=True)(type("Column", (Good,), {"name": "state"})), "'state' is no name for a task"),
        (dataclass(frozen=True)(type("Nameless", (Task,), {"summary": ""})), "Nameless has no name"),
        (dataclass(frozen=True)(type("Untold", (Task,), {"name": "untold"})), "Untold has no summary"),
        (type("Plain", (Good,), {}), "Plain is no dataclass"),
        (OfAList, "OfAList: option sizes is none of int, float, bool and str"),
    ],
)
def test_refusals(task: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        add_task(task)


def test_may_be_added_again() -> None:
    add_task(Good)
    add_task(Good)
    assert TASKS["good"] is Good
