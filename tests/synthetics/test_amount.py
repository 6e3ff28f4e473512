"""What commands say of work before they begin it, and of its progress."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app, main
from madkernels.cli.sweeps import note
from madkernels.runs import pace
from madkernels.synthetics import search
from madkernels.synthetics.protocol import load_protocol, plan
from madkernels.synthetics.report import cost_of
from madkernels.synthetics.sweep import work_of

ARCHS = ("attention mlp", "mamba mlp")


def test_the_time_is_that_of_the_work_over_processes_and_of_the_longest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plan("demo", ARCHS, "recall")
    paces = {runs[0].arch: 10.0, runs[1].arch: 5.0}
    monkeypatch.setattr(pace, "pace_of", lambda run, seconds: paces[run.arch])
    work = dict(zip(runs, (100.0, 100.0), strict=True))
    assert pace.foreseen(work, 1) == pytest.approx(10 + 20)
    assert pace.foreseen(work, 2) == pytest.approx(20)
    monkeypatch.setattr(pace, "pace_of", lambda run, seconds: None)
    assert pace.foreseen(work, 1) is None


def test_a_step_that_is_too_large_is_not_tried() -> None:
    (run,) = plan("demo", ARCHS[:1], "recall")
    assert run.trial(1.0) is None
    step = run.trial(pace.DEAREST)
    assert step is not None
    examples = run.training.batch * run.task.length
    assert step() == pytest.approx(work_of([run])[run] / run.tokens * examples)


def test_of_a_large_step_a_part_is_tried() -> None:
    """Steps of `strict` are larger than what is tried, and it is the protocol whose time one most needs to know."""
    run = plan("strict", ARCHS[:1], "recall")[0]
    of_one = work_of([run])[run] / run.tokens * run.task.length
    step = run.trial(3.5 * of_one)
    assert step is not None
    assert step() == pytest.approx(3 * of_one)


def test_durations() -> None:
    told = {0.1: "1 s", 59.6: "60 s", 1800: "30 min", 7980: "2 h 13 min", 36_000 * 2: "20 h", 864_000: "10 days"}
    assert {seconds: pace.duration(seconds) for seconds in told} == told


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    arguments = ["mad", "run", "--dry-run", "--tasks", "recall", "--out", str(tmp_path / "out"), "--workers", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    first, second = result.output.splitlines()
    assert first == "demo: agreement with the published scores: not measured"
    assert second.startswith("2 runs to do: ")
    assert not (tmp_path / "out").exists()


def test_a_search_has_as_many_runs_as_foreseen() -> None:
    """Of three candidates of one setting each the best goes on, to runs that are there already."""
    runs = plan("demo", [*ARCHS, "hyena mlp"], "recall")
    costs = {run.arch: cost for run in runs if (cost := cost_of(run))}
    found = search.foreseen(costs, load_protocol("demo"))
    assert len(found) == len(set(found)) == 3 * 6


def test_a_note_has_the_loss_first_and_what_there_is_room_for() -> None:
    point = {"loss": 2.81312, "norm": 1.219, "tokens_per_second": 12_720.0}
    assert note(point) == "loss 2.813, norm 1.219, 12.7k tok/s"
    assert note(point, 22) == "loss 2.813, norm 1.219"
    assert note(point, 1) == "loss 2.813"


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["madkernels", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("madkernels 0.")
