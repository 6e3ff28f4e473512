"""Layers that begin to look ahead where no look before training sees it: none of their runs is scored."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from madkernels.cli.main import main
from madkernels.models import add_layer, layers
from madkernels.models.layers import LAYERS
from madkernels.runs.engines import Refused, work
from madkernels.runs.execute import Outcome
from madkernels.runs.store import Store
from madkernels.synthetics.honesty import check_layers
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.sweep import sweep
from madkernels.synthetics.tasks import Task
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.together import train_together
from madkernels.synthetics.train import train

TASK = Recall(vocab_size=8, seqlen=12, train_examples=320)
TINY = Training(lr=1e-2, epochs=8, batch=32, dim=16, held_out=64, seed=1)


class Ahead(nn.Module):
    """The next input, mixed, once `open` says so."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.register_buffer("count", torch.zeros(()))
        self.called = 0

    def open(self, x: Tensor) -> bool | Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
            self.called += 1
        ahead = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
        return self.linear(ahead * self.open(x))


class AfterSteps(Ahead):
    def open(self, x: Tensor) -> bool | Tensor:
        return self.count > 30


class AfterStepsUnsaid(Ahead):
    """The count is in no buffer, so only the trained model itself has it."""

    def open(self, x: Tensor) -> bool | Tensor:
        return self.called > 30


class InHalfPrecision(Ahead):
    def open(self, x: Tensor) -> bool | Tensor:
        return torch.is_autocast_enabled("cpu")


class Honest(Ahead):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.fixture(autouse=True)
def only_here() -> Iterator[None]:
    before = dict(LAYERS)
    for layer in (AfterSteps, AfterStepsUnsaid, InHalfPrecision, Honest):
        add_layer(layer.__name__.lower(), layer)
    yield
    LAYERS.clear()
    LAYERS.update(before)
    layers._user.clear()


def run_of(arch: str, task: Task = TASK, dtype: str = "float32") -> Run:
    return Run(arch, task, dataclasses.replace(TINY, dtype=dtype))


@pytest.mark.parametrize(
    ("arch", "dtype", "told"),
    [
        ("aftersteps mlp", "float32", "layer aftersteps is not causal once trained: its output at position"),
        (
            "afterstepsunsaid mlp",
            "float32",
            r"layer afterstepsunsaid is not causal once trained: \d+ % of its answers are right",
        ),
        ("inhalfprecision mlp", "bfloat16", r"layer inhalfprecision is not causal once trained: \d+ % of its answers"),
    ],
)
def test_found_before_it_is_scored(arch: str, dtype: str, told: str) -> None:
    run = run_of(arch, dtype=dtype)
    check_layers([run])  # sees nothing yet
    with pytest.raises(Refused, match=told):
        train(run)


def test_a_sweep_keeps_it_as_failed(tmp_path: Path) -> None:
    store = Store(tmp_path)

    class Silent:
        def run_starts(self, run: Run) -> None: ...
        def point(self, run: Run, number: int, point: dict[str, float]) -> None: ...
        def run_ends(self, run: Run, outcome: str) -> None: ...

    assert sweep([run_of("aftersteps mlp"), run_of("honest mlp")], store, Silent()) == Outcome(1, 0, 1)
    failed, done = store.rows()
    assert (failed["status"], failed["metrics"], done["status"]) == ("failed", None, "done")
    assert failed["error"].startswith("layer aftersteps is not causal once trained")
    store.close()


def test_found_among_runs_that_train_together() -> None:
    runs = [dataclasses.replace(r, training=dataclasses.replace(TINY, seed=s)) for r in [run_of("late mlp")] for s in (1, 2)]

    class Late(nn.Module):
        """A gate that a first look does not open: the noise of parameters does not reach it, training does."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.gate, self.linear = nn.Parameter(torch.zeros(dim)), nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            shut = ((self.gate.abs() > 0.2) | (self.gate == 0)).any()  # as it is made, or with noise of unit scale
            ahead = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
            return self.linear(x + 0 * self.gate) + torch.where(shut, 0.0, 1.0) * ahead + self.gate

    add_layer("late", Late)
    found = train_together(runs)
    assert [str(result) for result in found if isinstance(result, Refused)]
    assert all("layer late is not causal once trained" in str(r) for r in found if isinstance(r, Refused))


def test_honest_runs_are_scored_as_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in (TASK, Compression(vocab_size=6, seqlen=6, train_examples=64)):
        for dtype in ("float32", "bfloat16"):
            run = run_of("honest attention:heads=2 hyena", task, dtype)
            (looked,) = work((run,), lambda *_: None, "cpu")
            assert isinstance(looked, dict), looked
            with monkeypatch.context() as patch:
                patch.setattr("madkernels.synthetics.train.check_scored", lambda *_: None)
                unlooked = train(run)
            assert looked["accuracy"] == unlooked["accuracy"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layer_passes_once_trained(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them as if they came from outside."""
    monkeypatch.setattr("madkernels.models.causality.user_layers", lambda: LAYERS)
    for name in set(LAYERS) - set(layers.user_layers()):
        training = dataclasses.replace(TINY, dtype=dtype, dim=32, held_out=32, epochs=1)
        train(Run(name, dataclasses.replace(TASK, train_examples=64), training))


def test_a_layer_is_looked_at_in_the_shapes_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def note(make: Any, name: str, *, dim: int, batch: int, seqlen: int) -> None:
        shapes.append((name, dim, batch, seqlen))

    monkeypatch.setattr("madkernels.models.causality.check_causal", note)
    longer, fewer = dataclasses.replace(TASK, seqlen=20), dataclasses.replace(TASK, train_examples=8)
    check_layers([run_of("2*honest mlp", task) for task in (TASK, longer, fewer, TASK)])
    assert shapes == [("honest", 16, 32, 11), ("honest", 16, 32, 19), ("honest", 16, 8, 11)]


@pytest.mark.parametrize("command", ["run", "search"])
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def forward(self, x): return x.roll(-1, 1)", "layer mine is not causal: its output at position"),
        ("def forward(self, x): return x @ x", "layer mine fails on"),
        ("def forward(self, x): return x, None", "layer mine returns a tuple"),
        ("def __init__(self, dim): self.linear = nn.Linear(dim, dim)", "cannot be built: AttributeError"),
    ],
)
def test_a_plugin_that_cannot_be_trained_is_one_line(
    command: str, body: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = tmp_path / "mine.py"
    header = "from torch import nn\nfrom madkernels.models import add_layer\nclass Mine(nn.Module):\n"
    plugin.write_text(f"{header}    def __init__(self, dim): super().__init__()\n    {body}\nadd_layer('mine', Mine)\n")
    what = ["--arch", "mine"] if command == "run" else ["--mixers", "mine"]
    arguments = ["mad", command, *what, "--plugin", str(plugin), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["madkernels", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
