"""What a layer from outside says of its kind counts in normalisation, reports and shares of attention."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from scaling_points import write_runs
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.models import layers
from madkernels.models.layers import LAYERS
from madkernels.reporting.figures import COLOURS, GREY, css
from madkernels.runs.engines import load_plugin
from madkernels.scaling.fits import report
from madkernels.scaling.fits.beyond_size import attention_share
from madkernels.scaling.training.prepare import prepare
from madkernels.scaling.training.tokenizers import Bytes
from madkernels.synthetics.page import _diagrams
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.tasks.recall import Recall

# One whose state is set by `slots`, one that is attention, one that mixes channels.
PLUGIN = """
from torch import nn
from madkernels.models import add_layer
from madkernels.models.layers import StateOption
from madkernels.models.layers.attention import Attention

class Slots(nn.Module):
    state_option = StateOption("slots")

    def __init__(self, dim: int, slots: int = 4) -> None:
        super().__init__()
        self.mix, self.slots = nn.Linear(dim, dim), slots

    def forward(self, x):
        return self.mix(x)

    def state_size(self, seqlen):
        return self.mix.in_features * min(seqlen, self.slots)

class Lookup(Attention):
    pass

class Gate(Slots):
    mixes = "channel"
    state_option = None
    hidden_option = "hidden"

    def __init__(self, dim: int, hidden: int = 16) -> None:
        nn.Module.__init__(self)
        self.mix = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def state_size(self, seqlen):
        return 0

add_layer("slots", Slots)
add_layer("lookup", Lookup)
add_layer("gate", Gate)
"""
ARCH = "slots gate lookup:heads=2 gate"
PROTOCOL = {
    "about": "", "score": "accuracy", "seeds": [1],
    "training": {"lr": [1e-2], "weight_decay": [0.0], "epochs": 1, "batch": 16, "dim": 16, "held_out": 16},
    "tasks": {"recall": {"baseline": {"vocab_size": 6, "seqlen": 6, "train_examples": 32}}},
}  # fmt: skip


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    before = dict(LAYERS)
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    yield path
    LAYERS.clear()
    LAYERS.update(before)
    layers._user.clear()


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(part) for part in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output


def colours(page: str) -> list[tuple[str, str]]:
    return re.findall(r'border-color: ([^"]+)">([^<]+)<', page)


def test_runs_and_stands_in_the_page(tmp_path: Path, plugin: Path) -> None:
    protocol, out = tmp_path / "tiny.json", tmp_path / "out"
    protocol.write_text(json.dumps(PROTOCOL))
    given = ["--out", out, "--plugin", plugin]
    call("mad", "run", "--protocol", protocol, "--engine", "process", "--arch", ARCH, "--arch", "mlp", *given)
    assert "224" in call("mad", "compare", *given)  # of 5 tokens: 4 slots of 16, and 5 keys and values
    call("mad", "report", *given)
    blue, orange, grey = css(COLOURS[0]), css(COLOURS[1]), GREY
    shown = colours((out / "report.html").read_text())
    assert shown[:4] == [(blue, "slots"), (grey, "gate"), (orange, "lookup:heads=2"), (grey, "gate")]


def test_is_normalised(plugin: Path) -> None:
    arguments = ["--state", 2048, "--parameters", 100_000, "--plugin", plugin]
    said = " ".join(call("mad", "normalise", "--arch", ARCH, *arguments).split())
    assert "slots:slots=16" in said
    assert said.count("gate:hidden=") == 2
    assert "2,048" in said


def test_counts_in_the_share_of_attention(tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESAMPLES", 20)
    runs = write_runs(tmp_path / "runs.csv")
    runs.write_text(runs.read_text().replace("hyena:order=8 swiglu attention:heads=4 swiglu", ARCH))
    arguments = ["scale", "report", runs, "--bootstrap", 20, "--out", tmp_path / "page.html"]
    call(*arguments)
    told = "striped: no share of attention: a layer of it is not known here"
    text = (tmp_path / "page.html").read_text()
    assert told in text
    assert "<h2>Share of attention" not in text
    call(*arguments, "--plugin", plugin)
    text = (tmp_path / "page.html").read_text()
    assert told not in text
    assert "<h2>Share of attention" in text
    assert attention_share(ARCH) == 0.5


def test_a_plan_sets_its_state(tmp_path: Path, plugin: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "plan.csv"
    prepare((PLUGIN[i:].encode() for i in range(20)), data, Bytes(), validation=0.2)
    sizes = ["--dim", 16, "--budget", "1e9", "--size", 64, "--size", 128, "--blocks", 1, "--seqlen", 32]
    call("scale", "plan", "state", "--arch", "mine=slots gate", *sizes, "--data", data, "--out", out, "--plugin", plugin)
    assert "slots gate" in out.read_text()
    assert "slots:slots=8 gate" in out.read_text()
    said = call("train", "plan", "--arch", "slots gate", "--dim", 16, "--plugin", plugin)
    assert "64 elements" in said


def test_every_kind_has_its_colour_and_its_share(plugin: Path) -> None:
    load_plugin(str(plugin))
    kinds = "attention sliding-attention linear-attention mamba swiglu rwkv-channel-mixer"
    blue, orange, grey = css(COLOURS[0]), css(COLOURS[1]), GREY
    results = [(Run(kinds, Recall(vocab_size=8, seqlen=16), Training(lr=1e-3)), None)]
    assert [colour for colour, _ in colours("".join(_diagrams(results)))] == [orange, orange, blue, blue, grey, grey]
    assert attention_share(kinds) == 0.5
    assert attention_share("rwkv5-time-mixer rwkv-channel-mixer attention mlp moe swiglu") == 0.5
    assert attention_share(f"{ARCH} gate") == 0.5
