"""`madkernels scale fit`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from scaling_points import CHINCHILLA, SURFACE, grid
from typer.testing import CliRunner

from madkernels.cli.main import app

NAMES = ["--params", "N", "--tokens", "D", "--loss", "L"]
QUICK = ["--bootstrap", "20", "--json", "-"]


def scale(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["scale", *map(str, arguments)], env={"COLUMNS": "200"})


def refused(*arguments: str | Path) -> str:
    result = scale(*arguments)
    assert isinstance(result.exception, ValueError | OSError), result.output
    return str(result.exception)


def write(path: Path, names: str, *columns: Any) -> Path:
    rows = zip(*columns, strict=True)
    path.write_text("\n".join([names, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    points = grid(noise=0.003)
    names = np.where(np.arange(64) % 2, "mamba", "hyena")
    flops = 6 * points.params * points.tokens
    return write(tmp_path / "runs.csv", "arch,N,D,C,L", names, points.params, points.tokens, flops, points.loss)


def test_chinchilla_points() -> None:
    if not CHINCHILLA.exists():
        pytest.skip(f"no {CHINCHILLA}")
    columns = ["--params", "Model Size", "--flops", "Training FLOP", "--loss", "loss", "--drop-highest", "5"]
    found = json.loads(scale("fit", CHINCHILLA, *columns, *QUICK, "--at", "5.76e23").stdout)
    assert found["points"] == 240
    assert len(found["dropped"]) == 5
    assert "among the 5 highest" in found["dropped"][0]["why"]
    assert [found[n] for n in ("E", "A", "B", "alpha", "beta")] == pytest.approx(
        [1.81722, 477.826, 2143.42, 0.34731, 0.36717], rel=1e-5
    )
    assert found["objective"] == pytest.approx(1.0182740178e-3)
    assert found["convergence"]["converged"]
    assert found["optimum"][0]["tokens"] / found["optimum"][0]["params"] == pytest.approx(17.92, abs=0.005)


def test_json_holds_all_that_was_found(runs: Path, tmp_path: Path) -> None:
    found = json.loads(scale("fit", runs, *NAMES, *QUICK).stdout)
    assert found["alpha"] == pytest.approx(SURFACE.alpha, abs=0.02)
    assert found["convergence"]["agreeing"] == 9
    assert found["intervals"]["bootstrap"]["resamples"] == 20
    for kind in ("bootstrap", "profile"):
        for name in ("E", "A", "B", "alpha", "beta", "a"):
            interval = found["intervals"][kind][name]
            assert interval["low"] <= found[name] <= interval["high"]
    place = tmp_path / "fit.json"
    result = scale("fit", runs, *NAMES, "--bootstrap", "20", "--json", place)
    assert json.loads(place.read_text()) == found
    assert "converged: gradient" in result.output
    by_flops = json.loads(scale("fit", runs, "--params", "N", "--flops", "C", "--loss", "L", *QUICK).stdout)
    assert by_flops["A"] == pytest.approx(found["A"])


def test_options_change_the_fit(runs: Path) -> None:
    tied = json.loads(scale("fit", runs, *NAMES, *QUICK, "--tied").stdout)
    assert tied["alpha"] == pytest.approx(tied["beta"])
    assert "a" not in tied["intervals"]["profile"]
    lad = json.loads(scale("fit", runs, *NAMES, *QUICK, "--lad").stdout)
    assert (lad["loss_function"], lad["delta"]) == ("least absolute deviations", None)
    squares = json.loads(scale("fit", runs, *NAMES, *QUICK, "--delta", "1").stdout)
    assert len({found["alpha"] for found in (tied, lad, squares)}) == 3


def test_a_fit_for_each_group(runs: Path) -> None:
    found = json.loads(scale("fit", runs, *NAMES, *QUICK, "--group", "arch", "--drop-highest", "1").stdout)["groups"]
    assert {name: part["points"] for name, part in found.items()} == {"hyena": 31, "mamba": 31}
    result = scale("fit", runs, *NAMES, "--bootstrap", "0", "--group", "arch")
    assert "beta: mamba" in " ".join(result.output.split())


def test_runs_of_other_kinds_are_left_out(runs: Path, tmp_path: Path) -> None:
    lines = runs.read_text().splitlines()
    kinds = ["kind", *["isoflop"] * 40, *["overtrained"] * 20, *["state"] * 4]
    mixed = tmp_path / "mixed.csv"
    mixed.write_text("\n".join(f"{kind},{line}" for kind, line in zip(kinds, lines, strict=True)) + "\n")
    assert json.loads(scale("fit", mixed, *NAMES, *QUICK).stdout)["points"] == 60
    assert json.loads(scale("fit", mixed, *NAMES, *QUICK, "--approach", "1").stdout)["points"] == 40


def test_rows_that_are_dropped_are_told_by_line(tmp_path: Path) -> None:
    points = grid(noise=0.003)
    loss = [*points.loss[:-4], "nan", -2.0, "", 3e5]
    result = scale("fit", write(tmp_path / "runs.csv", "N,D,L", points.params, points.tokens, loss), *NAMES, *QUICK)
    assert json.loads(result.stdout)["points"] == 60
    for line in (
        "runs.csv, line 62: dropped: the loss is nan",
        "runs.csv, line 63: dropped: the loss is -2: not positive",
        "runs.csv, line 64: dropped: the loss is nan",
        "runs.csv, line 65: dropped: the loss is 300000 nats",
    ):
        assert line in result.stderr
    unfinished = write(
        tmp_path / "b.csv", "N,D,L,status", points.params, points.tokens, points.loss, ["done"] * 63 + ["failed"]
    )
    assert "line 65: dropped: the run is failed" in scale("fit", unfinished, *NAMES, *QUICK).stderr


def test_columns_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    points = grid(noise=0.003)
    flops = 6 * points.params * points.tokens
    flops[4] *= 1000
    path = write(tmp_path / "runs.csv", "N,D,flops,L", points.params, points.tokens, flops, points.loss)
    stderr = scale("fit", path, *NAMES, *QUICK).stderr
    assert stderr.count("warning") == 1
    assert "runs.csv, line 6: flops is" in stderr


def test_refusals(runs: Path, tmp_path: Path) -> None:
    text = runs.read_text()
    assert "no column 'tokens'; there are: arch, N, D, C, L" in refused(
        "fit", runs, "--params", "N", "--tokens", "tokens", "--loss", "L"
    )
    assert "--tokens or from --flops: both" in refused("fit", runs, *NAMES, "--flops", "C")
    assert "--tokens or from --flops: none" in refused("fit", runs, "--params", "N", "--loss", "L")
    assert "No such file" in refused("fit", tmp_path / "none.csv", *NAMES)
    few = tmp_path / "few.csv"
    few.write_text("\n".join(text.splitlines()[:5]))
    assert "4 points cannot determine 5 parameters" in refused("fit", few, *NAMES)
    assert "hyena: 2 points cannot" in refused("fit", few, *NAMES, "--group", "arch")
    bad = tmp_path / "bad.csv"
    bad.write_text(text.replace("mamba,1", "mamba,many", 1))
    assert "expected a number" in refused("fit", bad, *NAMES)
    bad.write_text("N,D,L\n-1,2,3\n")
    assert "bad.csv, line 2: N is -1; expected a positive number" in refused("fit", bad, *NAMES)
    bad.write_text("N,D,L\n1,2\n")
    assert "bad.csv, line 2: 2 cells; expected 3" in refused("fit", bad, *NAMES)
    bad.write_text("")
    assert "is empty" in refused("fit", bad, *NAMES)
    bad.write_text("N,D,L\n1,2,nan\n")
    assert "no row can be used: bad.csv, line 2: the loss is nan" in refused("fit", bad, *NAMES)
    bad.write_text("N,D,L\n")
    assert "no rows" in refused("fit", bad, *NAMES)
