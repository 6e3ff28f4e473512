"""A task from outside goes through every command."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.synthetics.tasks import TASKS

# Five kinds of token, so more than there are colours, and one of no kind.
PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from madkernels.synthetics.tasks import TASKS, Task

@dataclass(frozen=True)
class Echo(Task):
    name: ClassVar[str] = "echo"
    summary: ClassVar[str] = "say each token again"
    loud: bool = False

    def roles(self):
        return {f"kind{n}": range(n, n + 1) for n in range(5)}

    def make(self, draws, seed, split):
        inputs = draws.below(self.vocab_size, self.seqlen)
        return inputs, inputs.copy()

TASKS["echo"] = Echo
"""
TRAINING = {"lr": [1e-2], "weight_decay": [0.0], "epochs": 1, "batch": 16, "dim": 16, "held_out": 16}
SETTING = {"baseline": {"vocab_size": 6, "seqlen": 6, "train_examples": 32}}


@pytest.fixture(autouse=True)
def only_here() -> Iterator[None]:
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


@pytest.mark.parametrize("beside", [[], ["compression"]])
def test_goes_through_every_command(tmp_path: Path, beside: list[str]) -> None:
    plugin, protocol = tmp_path / "echo.py", tmp_path / "mine.json"
    plugin.write_text(PLUGIN)
    echo = SETTING | {"changes": {"loud": [True]}}
    tasks = {"echo": echo} | dict.fromkeys(beside, SETTING)
    protocol.write_text(json.dumps({"about": "", "score": "accuracy", "seeds": [1], "training": TRAINING, "tasks": tasks}))
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
    assert "<th>echo</th>" in page
    assert ("here, over 1 tasks" if beside else "None of these tasks has published scores.") in page
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
