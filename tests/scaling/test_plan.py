"""Plans, and what becomes of them on engines."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.models import HybridLM, counting
from madkernels.models.presets import architecture
from madkernels.runs.engines import InProcess
from madkernels.runs.execute import Outcome
from madkernels.runs.store import Results, Store
from madkernels.scaling.plan import Planned, Setting, counts, isoflop, overtrained, read_plan, states, write_plan
from madkernels.scaling.sweep import runs_of, sweep, write_csv
from madkernels.scaling.training.prepare import prepare
from madkernels.scaling.training.recipe import LMRun
from madkernels.scaling.training.tokenizers import Bytes

ARCHS = {"hybrid": "hyena swiglu attention:heads={dim/8} swiglu", "mamba": "mamba"}
SETTING = Setting(vocab_size=257, seqlen=32, batch=2)
DIMS = (8, 16, 24, 32, 48, 64)
TEXT = Path(subprocess.__file__).read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    prepare((TEXT[i : i + 2000] for i in range(0, len(TEXT), 2000)), folder, Bytes(), validation=0.2)
    return folder


# ---- plans


def test_runs_of_a_budget_take_it_and_share_a_batch() -> None:
    rows = isoflop(ARCHS, [1e10, 9e10], DIMS, SETTING, blocks=2, sizes=4)
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        assert row.flops == pytest.approx(row.budget, rel=0.5 / row.steps)
        assert row.tokens == row.steps * row.batch * row.seqlen
        assert row.batch == {1e10: 2, 9e10: 6}[row.budget]


def test_counts_are_those_of_a_model() -> None:
    (row,) = (
        r for r in isoflop(ARCHS, [1e10], DIMS, SETTING, blocks=2, sizes=6) if r.dim == 32 and r.architecture == "hybrid"
    )
    model = HybridLM(row.arch, vocab_size=257, dim=32, tied=True)
    assert row.params == sum(p.numel() for p in model.backbone.parameters())
    assert row.flops == pytest.approx(3 * counting.flops_per_token(model, 32) * row.tokens)
    assert row.state == counting.state_size(model, 32)
    assert row.arch == "hyena swiglu attention:heads=4 swiglu"


def test_sizes_stand_around_the_wanted_ratio() -> None:
    rows = isoflop({"mamba": "mamba"}, [1e10, 1e11], DIMS, SETTING, blocks=2, sizes=3, ratio=10)
    by_budget = [[row for row in rows if row.budget == budget] for budget in (1e10, 1e11)]
    assert [row.dim for row in by_budget[0]] < [row.dim for row in by_budget[1]]
    for group in by_budget:
        distances = [abs(math.log(row.tokens_per_param / 10)) for row in group]
        assert distances[1] == min(distances) or group[0].dim == 8


def test_an_overtrained_ladder_and_a_ladder_of_states() -> None:
    ladder = overtrained(ARCHS, 16, [10, 100], SETTING, blocks=2)
    assert [row.tokens_per_param for row in ladder] == pytest.approx([10, 100] * 2, rel=0.02)
    assert {row.kind for row in ladder} == {"overtrained"}
    rows = states({"mamba": "mamba"}, 16, 1e10, [256, 1024], SETTING, blocks=2)
    assert [row.fixed_state for row in rows] == [256, 1024]
    assert [row.arch.split()[0] for row in rows] == ["mamba:dstate=2", "mamba:dstate=8"]


def test_experts_count_as_far_as_a_token_uses_them() -> None:
    (row,) = overtrained({"moe": "hyena moe:experts=8,hidden=16"}, 16, [20], SETTING, blocks=1)
    assert row.active_params < row.params
    assert row.tokens_per_param == pytest.approx(20, rel=0.02)


def test_seeds_and_rates() -> None:
    setting = dataclasses.replace(SETTING, seeds=(1, 2), lr=1e-2)
    rows = isoflop({"mamba": "mamba"}, [1e10], (16, 64), setting, blocks=1, sizes=2)
    assert [(row.dim, row.seed) for row in rows] == [(16, 1), (16, 2), (64, 1), (64, 2)]
    assert [row.lr for row in rows] == pytest.approx([2e-2, 2e-2, 1e-2, 1e-2])


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = isoflop(ARCHS, [1e10], DIMS, SETTING, blocks=2)
    write_plan(rows, tmp_path / "plan.csv")
    assert read_plan(tmp_path / "plan.csv") == rows


def test_a_plan_takes_the_place_of_nothing_without_force(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "results.csv"
    out.write_text("a table of results\n")
    common = ["--data", str(data), "--out", str(out), "--seqlen", "32", "--blocks", "1", "--arch", "mlp=mlp mlp"]
    plans = (
        ["isoflop", "--budget", "1e9", "--dims", "8,16,24", "--sizes", "3"],
        ["overtrained", "--dim", "8", "--ratio", "20"],
        ["state", "--dim", "16", "--budget", "1e9", "--size", "64"],
    )
    for plan in plans:
        result = CliRunner().invoke(app, ["scale", "plan", *plan, *common])
        assert f"{out} is there already; choose another name, or --force to write over it" in str(result.exception)
        assert out.read_text() == "a table of results\n"
    assert CliRunner().invoke(app, ["scale", "plan", *plans[0], *common, "--force"]).exit_code == 0
    assert len(read_plan(out)) == 3
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs.csv").write_text("results of something else\n")
    result = CliRunner().invoke(app, ["scale", "run", str(out), "--data", str(data), "--out", str(tmp_path / "out")])
    assert "runs.csv is there, but not the results.sqlite of its runs; choose another folder" in str(result.exception)


def test_runs_of_a_few_steps_are_told(tmp_path: Path, data: Path) -> None:
    arguments = [
        "--budget",
        "2e7",
        "--dims",
        "8,16,24",
        "--sizes",
        "3",
        "--blocks",
        "1",
        "--seqlen",
        "32",
        "--arch",
        "mlp=mlp mlp",
    ]
    result = CliRunner().invoke(
        app, ["scale", "plan", "isoflop", *arguments, "--data", str(data), "--out", str(tmp_path / "plan.csv")]
    )
    assert result.exit_code == 0, result.exception
    assert "warning: 3 of 3 runs have fewer than 20 steps, too few to tell anything" in result.stderr


def test_refusals(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="6 widths do not make 7 sizes"):
        isoflop(ARCHS, [1e10], DIMS, SETTING, blocks=2, sizes=7)
    with pytest.raises(ValueError, match="unknown layer 'hyna'"):
        isoflop({"hyna": "hyna"}, [1e10], DIMS, SETTING, blocks=2, sizes=7)
    with pytest.raises(ValueError, match=r"hybrid at width 64: a budget of 1e\+06 FLOPs is less than one step"):
        isoflop(ARCHS, [1e6], (64,), SETTING, blocks=2, sizes=1)
    with pytest.raises(ValueError, match="dim 20 does not divide"):
        isoflop({"a": "attention:heads=3"}, [1e10], (20,), SETTING, blocks=1, sizes=1)
    rows = isoflop(ARCHS, [1e10], DIMS, SETTING, blocks=2)
    with pytest.raises(ValueError, match=r"the plan is for a vocabulary of 100; .* has 257"):
        runs_of([dataclasses.replace(rows[0], vocab_size=100)], data, tmp_path)
    path = tmp_path / "plan.csv"
    write_plan(rows, path)
    whole = path.read_text()
    path.write_text(whole.replace("kind,", "sort,", 1))
    with pytest.raises(ValueError, match="it has no column kind"):
        read_plan(path)
    path.write_text(whole.replace(rows[1].arch, "hiena", 1).replace(rows[0].arch, "hiena", 1))
    with pytest.raises(ValueError, match=r"plan\.csv, line 2: unknown layer 'hiena'"):
        read_plan(path)
    path.write_text(whole.replace(",8,2,", ",many,2,", 1))
    with pytest.raises(ValueError, match=r"plan\.csv, line 2: dim is 'many'; expected a whole number"):
        read_plan(path)
    path.write_bytes(whole.encode() + b"\xff")
    with pytest.raises(ValueError, match=r"plan\.csv: not UTF-8 text"):
        read_plan(path)
    path.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="has no runs"):
        read_plan(path)


# ---- runs


class Silent:
    def run_starts(self, run: LMRun) -> None: ...
    def point(self, run: LMRun, number: int, point: dict[str, float]) -> None: ...
    def run_ends(self, run: LMRun, outcome: str) -> None: ...


def tiny() -> list[Planned]:
    return isoflop({"mlp": "mlp mlp", "hybrid": ARCHS["hybrid"]}, [2e8], (8, 16), SETTING, blocks=2, sizes=2)


def done(rows: list[Planned], data: Path, out: Path, engine: object) -> tuple[Outcome, list[dict[str, str]]]:
    runs, store = runs_of(rows, data, out), Store(out)
    work = {run: row.flops for run, row in zip(runs, rows, strict=True)}
    outcome = sweep(runs, work, store, Silent(), engine)  # type: ignore[arg-type]
    write_csv(rows, runs, store, out / "runs.csv")
    store.close()
    with (out / "runs.csv").open() as file:
        return outcome, list(csv.DictReader(file))


def test_a_plan_becomes_a_table_of_losses(data: Path, tmp_path: Path) -> None:
    outcome, lines = done(tiny(), data, tmp_path, InProcess())
    assert outcome == Outcome(4, 0, 0)
    assert [line["dim"] for line in lines] == ["8", "16"] * 2
    assert all(line["status"] == "done" and 2 < float(line["loss"]) < 6 for line in lines)
    assert done(tiny(), data, tmp_path, InProcess())[0] == Outcome(0, 4, 0)


def test_a_run_that_fails_is_a_gap(data: Path, tmp_path: Path) -> None:
    rows = tiny()
    rows[0] = dataclasses.replace(rows[0], lr=1e30, steps=60)
    outcome, lines = done(rows, data, tmp_path, InProcess())
    assert outcome == Outcome(3, 0, 1)
    assert (lines[0]["status"], lines[0]["loss"]) == ("failed", "")
    results = Results(tmp_path)
    assert "steps in a row skipped" in next(row["error"] for row in results.rows() if row["error"])
    results.close()


def test_another_plan_or_other_data_are_other_runs(data: Path, tmp_path: Path) -> None:
    (first, *_), (other, *_) = (runs_of(tiny(), folder, tmp_path) for folder in (data, data))
    assert first.key() == other.key()
    changed = dataclasses.replace(tiny()[0], lr=1e-3)
    assert runs_of([changed], data, tmp_path)[0].key() != first.key()
    prepare(iter([TEXT[:9000], *(bytes([c]) * 500 for c in range(97, 117))]), tmp_path / "data", Bytes(), validation=0.2)
    assert runs_of(tiny(), tmp_path / "data", tmp_path)[0].key() != first.key()


def test_a_run_knows_itself_from_its_configuration(data: Path, tmp_path: Path) -> None:
    (run, *_) = runs_of(tiny(), data, tmp_path)
    assert LMRun.of(json.loads(json.dumps(run.config()))) == run
    assert str(run) == "isoflop 2e+08: mlp, width 8"


def test_a_killed_command_goes_on(data: Path, tmp_path: Path) -> None:
    """From plan to table through the command line, killed in its middle with all its workers."""
    command = [sys.executable, "-m", "madkernels.cli", "scale"]
    sizes = ["--budget", "1e9", "--dims", "8,16,24", "--sizes", "3", "--blocks", "1", "--seqlen", "32"]
    archs, plan, out = ["--arch", "mlp=mlp mlp", "--arch", "mine=hyena swiglu"], str(tmp_path / "plan.csv"), tmp_path / "out"
    making = [*command, "plan", "isoflop", *archs, *sizes, "--data", str(data), "--out", plan]
    subprocess.run(making, check=True, capture_output=True, timeout=120)
    run = [*command, "run", plan, "--data", str(data), "--out", str(out), "--workers", "2"]
    started = subprocess.Popen(run, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert started.stdout is not None
    assert started.stdout.readline().startswith("6 runs to do: ")
    assert started.stdout.readline().startswith("[1/6] isoflop 1e+09: ")
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    time.sleep(1)  # workers end with their parent
    found = subprocess.run(run, capture_output=True, text=True, timeout=240, env=os.environ | {"COLUMNS": "200"})
    assert found.returncode == 0, found.stderr
    assert "0 failed" in found.stdout
    assert found.stdout.startswith("going on: ")
    assert "6 found done" not in found.stdout
    with (out / "runs.csv").open() as file:
        assert [line["status"] for line in csv.DictReader(file)] == ["done"] * 6


def test_counting_allocates_nothing() -> None:
    """Seven billion parameters in float32 would be 28 GB."""
    assert counts(architecture("striped-hyena", 4096, 32), 4096, 50_304, 8192).params > 6e9
