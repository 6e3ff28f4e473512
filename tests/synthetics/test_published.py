"""The architectures with published scores, by name: what they are at a width, and that records and reports know them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.models import SpecError, parse
from madkernels.models.normalise import fixed_state
from madkernels.models.presets import PUBLISHED, architecture, canonical, layers_of, resolve
from madkernels.runs.store import Results
from madkernels.scaling.fits import correlate
from madkernels.scaling.plan import Setting, overtrained
from madkernels.synthetics import published
from madkernels.synthetics.page import page
from madkernels.synthetics.protocol import Run, Training, plan
from madkernels.synthetics.sweep import check, work_of
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.train import build, train

NAMES = [f"published:{name}" for name in PUBLISHED]
TINY = Training(lr=1e-3, epochs=1, batch=16, dim=16, held_out=32, seed=1)
TASK = Recall(8, 8, 32)

# As the paper states them at width 128 or, where it does not, as its code has them.
FILTER = {"horizon": 127, "turns": 1e-4, "frequency": 1.0}
ATTENTION = ("attention", {"heads": 16})
SWIGLU = ("swiglu", {"hidden": 512})
MOE = ("moe", {"experts": 8, "top_k": 2, "hidden": 16, "dense": False})
HYENA = ("hyena", {"expand": 4, "groups": 4, "width": 3, "order": 4} | FILTER)
MH_HYENA = ("mh-hyena", {"heads": 16, "width": 3, "order": 2} | FILTER)
EXPERTS = ("hyena-experts", {"experts": 8, "top_k": 2, "hidden": 16, "width": 3, "order": 16} | FILTER)
MAMBA = ("mamba", {"dstate": 4, "expand": 2, "width": 4, "bias": False})
GLA = ("gated-linear-attention", {"heads": 8, "rank": 16})
DELTANET = ("deltanet", {"heads": 8, "width": 4})
STATED: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "transformer": (0, [ATTENTION, SWIGLU] * 2),
    "hyena": (4096, [HYENA, SWIGLU] * 2),
    "mh-hyena": (4096, [MH_HYENA, SWIGLU] * 2),
    "mamba": (4096, [MAMBA] * 4),
    "gla": (4096, [GLA, SWIGLU] * 2),
    "deltanet": (4096, [DELTANET, SWIGLU] * 2),
    "striped-hyena": (2048, [HYENA, SWIGLU, ATTENTION, SWIGLU]),
    "striped-hyena-moe": (2048, [HYENA, MOE, ATTENTION, MOE]),
    "striped-hyena-experts-moe": (2048, [EXPERTS, MOE, ATTENTION, MOE]),
}


# ---- what a name stands for


def with_defaults(spec: Any, names: Any) -> dict[str, Any]:
    """The options of a layer by these names, those that are as by default included."""
    layer = spec.layer.__init__.__kwdefaults__ | dict(spec.options)
    return {name: layer[name] for name in names}


@pytest.mark.parametrize("name", PUBLISHED)
def test_at_width_128_they_are_as_published(name: str) -> None:
    state, layers = STATED[name]
    found = resolve(f"published:{name}", 128, seqlen=127)
    assert [
        (spec.name, with_defaults(spec, options)) for spec, (_, options) in zip(found.layers, layers, strict=True)
    ] == layers
    assert fixed_state(found, 128) == state


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dim", [16, 64, 256])
def test_at_other_widths_widths_and_numbers_of_heads_scale(name: str, dim: int) -> None:
    state, layers = STATED[name]
    found = resolve(f"published:{name}", dim, seqlen=127)
    assert fixed_state(found, dim) == state * dim // 128
    for spec, (_, options) in zip(found.layers, layers, strict=True):
        scaled = {k: v * dim // 128 if k in ("heads", "hidden", "rank") else v for k, v in options.items()}
        assert with_defaults(spec, options) == scaled


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("task", [TASK, Compression(6, 8, 32)], ids=lambda task: task.name)
def test_each_trains(name: str, task: Any) -> None:
    run = Run(f"published:{name}", task, TINY)
    check([run])
    assert work_of([run])[run] > 0
    assert 0 <= train(run)["accuracy"] <= 1


def test_filters_reach_over_the_setting() -> None:
    horizons = {
        build(Run("published:hyena", Recall(8, seqlen, 32), TINY)).backbone.layers[0].filter.horizon for seqlen in (8, 16)
    }
    assert horizons == {7, 15}


def test_what_is_no_name_is_refused() -> None:
    assert canonical(" published:gla ") == "published:gla"
    for call in (canonical, layers_of, lambda text: plan("demo", [text])):
        with pytest.raises(ValueError, match=r"unknown published architecture 'Mamba-'; .* did you mean mamba\?"):
            call("published:Mamba-")
    with pytest.raises(SpecError, match=r"published:NAME is a whole architecture, stands alone, and takes a width"):
        parse("2*published:gla")
    with pytest.raises(ValueError, match="multiples of 16, not 24"):
        check([Run("published:gla", TASK, dataclasses.replace(TINY, dim=24))])


# ---- records and reports


def test_published_rows_and_names_are_the_same() -> None:
    rows = published.published()
    assert [row.arch for row in rows.values()] == list(PUBLISHED)
    for name, row in rows.items():
        assert published.family(f"published:{row.arch}") == name
        assert published.family(str(resolve(f"published:{row.arch}", 64, seqlen=32))) == name, "by its layers, too"
    assert published.family("published:of-another-version") is None


def test_the_record_says_what_the_name_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("published:gla", TASK, TINY)
    config = json.loads(json.dumps(run.config()))
    assert config["arch"] == "published:gla"
    assert config["stands_for"] == str(resolve("published:gla", 16, seqlen=7))
    assert Run.of(config).key() == run.key()
    monkeypatch.setitem(PUBLISHED, "gla", "gated-linear-attention:heads=1 swiglu")
    assert Run("published:gla", TASK, TINY).key() != run.key(), "other sizes are another run"
    assert "stands_for" not in Run("mamba", TASK, TINY).config()


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    file = tmp_path / "tiny.json"
    training = {"lr": [1e-3], "weight_decay": [0.0], "epochs": 1, "batch": 16, "dim": 16, "held_out": 32}
    tasks = {"recall": {"baseline": {"vocab_size": 8, "seqlen": 8, "train_examples": 32}}}
    file.write_text(json.dumps({"about": "", "score": "accuracy", "seeds": [1], "training": training, "tasks": tasks}))
    return str(file)


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["mad", *arguments], env={"COLUMNS": "240"})
    assert result.exit_code == 0, result.output
    return result.output


def test_a_sweep_is_resumed_and_reported_by_name(tiny: str, tmp_path: Path) -> None:
    out = str(tmp_path / "runs")
    arguments = ["run", "--protocol", tiny, "--engine", "process", "--out", out, "--arch", "published:transformer"]
    assert "1 runs trained, 0 found done" in command(*arguments)
    told = command(*arguments, "--arch", "published:mamba", "--arch", "2*mamba", "--arch", "published:striped-hyena")
    assert "3 runs trained, 1 found done" in told
    assert "published:transformer" in told
    rows = Results(Path(out)).latest(Run.of)
    text = page(rows, "t")
    table = text[text.index("Compared with published scores") :]
    assert "3 architectures" in table
    assert "sizes of one&#39;s own" not in table, "the Mamba that is named counts"
    only = page([row for row in rows if row["run"].arch != "published:mamba"], "t")
    assert "sizes of one&#39;s own: Mamba." in only[only.index("Compared with published scores") :]
    assert text.count("mamba:dstate=4") >= 4, "the layers that the name stands for"


def test_the_published_are_listed() -> None:
    told = command("published", "--dim", "64")
    for name, row in published.published().items():
        assert f"published:{row.arch} " in told
        assert f"{100 * row.mad:.1f}" in told
        assert row.note in told, name
    assert "4*mamba:dstate=4" in told
    assert "2,048" in told
    result = CliRunner().invoke(app, ["mad", "published", "--dim", "40"])
    assert "multiples of 16, not 40" in str(result.exception)


def test_names_are_taken_wherever_an_architecture_is(tiny: str, tmp_path: Path) -> None:
    assert "4,096" in command("normalise", "--arch", "published:gla")
    found = command(
        "search", "--arch", "published:gla", "--mixers", "mamba", "--channels", "mlp", "--blocks", "1", "--protocol", tiny,
        "--out", str(tmp_path / "search"), "--workers", "1",
    )  # fmt: skip
    assert "2 of 2 candidates" in found
    assert "published:gla" in found
    (row,) = overtrained({"mine": "published:mamba"}, 32, [20.0], Setting(vocab_size=257, seqlen=32, batch=2), blocks=1)
    assert row.arch == "mamba:dstate=4 mamba:dstate=4"
    assert str(architecture("published:striped-hyena", 128, 1, seqlen=64)) == "attention swiglu:hidden=512"
    assert correlate._kinds("published:striped-hyena") == correlate._kinds("2*(hyena swiglu attention swiglu)")
