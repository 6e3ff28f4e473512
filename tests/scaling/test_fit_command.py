"""`madkernels scale fit`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings, strategies as st
from scaling_points import CHINCHILLA, GADRE, SURFACE, grid, write_runs
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


def test_runs_of_other_kinds_are_excluded(runs: Path, tmp_path: Path) -> None:
    lines = runs.read_text().splitlines()
    kinds = ["kind", *["isoflop"] * 40, *["overtrained"] * 20, *["state"] * 4]
    mixed = tmp_path / "mixed.csv"
    mixed.write_text("\n".join(f"{kind},{line}" for kind, line in zip(kinds, lines, strict=True)) + "\n")
    assert json.loads(scale("fit", mixed, *NAMES, *QUICK).stdout)["points"] == 60
    assert json.loads(scale("fit", mixed, *NAMES, *QUICK, "--approach", "1").stdout)["points"] == 40


def test_kinds_of_another_table_are_no_reason_to_leave_rows_out(runs: Path, tmp_path: Path) -> None:
    head, *lines = runs.read_text().splitlines()
    path = tmp_path / "kinds.csv"
    path.write_text("\n".join([f"kind,{head}", *(f"dense,{line}" for line in lines)]) + "\n")
    result = scale("fit", path, *NAMES, *QUICK)
    assert json.loads(result.stdout)["points"] == 64
    assert not result.stderr
    path.write_text(
        "\n".join([f"kind,{head}", *(f"{'state' if i < 9 else 'dense'},{line}" for i, line in enumerate(lines))])
    )
    result = scale("fit", path, *NAMES, *QUICK)
    assert json.loads(result.stdout)["points"] == 55
    assert result.stderr == "note: 9 rows of ladders (column kind: overtrained, state) are excluded\n"


def test_the_columns_of_scale_run_need_no_names(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line for line in lines if ",striped," in line)]) + "\n")
    named = ["--params", "params", "--tokens", "tokens", "--loss", "loss"]
    plain = ["--bootstrap", "0", "--json", "-"]
    assert scale("fit", path, *plain).stdout == scale("fit", path, *named, *plain).stdout
    both = ["--approach", "2", "--group", "architecture", *plain]
    assert (
        scale("fit", path, *both).stdout
        == scale("fit", path, *both, *named, "--flops", "flops", "--budget", "budget").stdout
    )
    path.write_text(path.read_text().replace(",tokens,", ",seen,"))
    assert json.loads(scale("fit", path, *plain).stdout)["points"] == 15, "by FLOPs"


@pytest.mark.parametrize(("beta", "why"), [(-0.1, "an exponent is not positive"), (0.0, "the fit has not converged")])
def test_no_optimum_where_there_is_none(tmp_path: Path, beta: float, why: str) -> None:
    """Losses that rise with data, and such that do not know it."""
    params, tokens = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 3)))
    loss = dataclasses.replace(SURFACE, B=0.05, beta=beta).loss(params, tokens)
    path = write(tmp_path / "rising.csv", "arch,N,D,L", ["a"] * 12, params, tokens, loss)
    place = tmp_path / "fit.json"
    result = scale("fit", path, *NAMES, "--bootstrap", "2", "--at", "1e20", "--group", "arch", "--json", place)
    assert result.exit_code == 0, result.exception
    assert f"no optimum, for {why}" in " ".join(result.output.split())
    (optimum,) = json.loads(place.read_text())["groups"]["a"]["optimum"]
    assert optimum == {"flops": 1e20, "params": None, "tokens": None, "loss": None}
    assert "--at: -1.0; expected a positive number of FLOPs" in refused("fit", path, *NAMES, "--at", "-1")


def test_a_group_that_cannot_be_fitted_does_not_end_the_others(runs: Path) -> None:
    lines = runs.read_text().splitlines()
    runs.write_text("\n".join([*lines, "few,1e8,1e9,6e17,3.5", "bad,1e8,-1,6e17,3.5"]) + "\n")
    result = scale("fit", runs, *NAMES, *QUICK, "--group", "arch")
    assert result.exit_code == 0
    found = json.loads(result.stdout)["groups"]
    assert {name: part.get("points") for name, part in found.items()} == {"hyena": 32, "mamba": 32, "few": None, "bad": None}
    assert found["few"] == {"error": "1 points cannot determine 5 parameters"}
    assert "warning: few: not fitted: 1 points cannot determine 5 parameters" in result.stderr
    assert "warning: bad: not fitted: runs.csv, line 67: D is -1; expected a positive number" in result.stderr
    shown = scale("fit", runs, *NAMES, "--bootstrap", "0", "--group", "arch").output
    assert all(f"beta: {name}" in " ".join(shown.split()) for name in ("hyena", "mamba"))


@pytest.mark.parametrize("approach", ["1", "2", "3"])
def test_a_diverged_run_is_told_in_every_approach(tmp_path: Path, approach: str) -> None:
    path = write_runs(tmp_path / "runs.csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line for line in lines if line.startswith("isoflop,mamba"))]) + "\n")
    clean = scale("fit", path, *QUICK, "--approach", approach)
    assert not clean.stderr
    lines = path.read_text().splitlines()
    lines[7] = ",".join([*lines[7].split(",")[:-2], "10.0", "done"])
    path.write_text("\n".join(lines) + "\n")
    result = scale("fit", path, *QUICK, "--approach", approach)
    assert result.stderr.startswith("warning: runs.csv, line 8: the loss 10 is far from the 3.")
    assert "runs.csv, line 8: the loss 10" in json.loads(result.stdout)["warnings"][0]
    without = scale("fit", path, *QUICK, "--approach", approach, "--max-loss", "5")
    assert without.stderr == "warning: runs.csv, line 8: dropped: the loss is 10: above --max-loss 5\n"
    assert json.loads(without.stdout)["a"] == pytest.approx(json.loads(clean.stdout)["a"], abs=0.02)


def test_nothing_is_overwritten_without_force(runs: Path, tmp_path: Path) -> None:
    whole = runs.read_text()
    for name in ("fit", "compare"):
        assert f"{runs} is there already; choose another name, or --force" in refused(name, runs, *NAMES, "--json", runs)
    assert runs.read_text() == whole
    assert "is a folder" in refused("fit", runs, *NAMES, "--json", tmp_path)
    place = tmp_path / "fit.json"
    place.write_text("mine")
    assert "is there already" in refused("fit", runs, *NAMES, "--json", place)
    assert scale("fit", runs, *NAMES, "--bootstrap", "0", "--json", place, "--force").exit_code == 0
    assert json.loads(place.read_text())["points"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.json", "runs.csv"], "nothing is left half written"
    assert "cannot be written: No such file" in refused("fit", runs, *NAMES, "--json", tmp_path / "none" / "fit.json")


numbers = st.one_of(
    st.sampled_from([1.0, 1e8, 3e8, 1e9, 1e10, 3e10]),
    st.floats(1e-70, 1e70),
    st.sampled_from([float("nan"), float("inf"), -1.0, 0.0]),
)
losses = st.one_of(st.floats(1.5, 4), st.sampled_from([3.0, 10.0, 1e-8, 0.0, float("nan"), float("inf"), 1e6]))


@settings(max_examples=8)
@given(
    rows=st.lists(st.tuples(numbers, numbers, losses, st.sampled_from("ab")), max_size=9),
    options=st.sampled_from(
        [(), ("--approach", "1"), ("--approach", "2", "--budget", "C"), ("--tied",), ("--group", "arch")]
    ),
    usual=st.booleans(),
)
def test_any_table_ends_in_a_law_or_a_sentence(tmp_path: Path, rows: Any, options: tuple[str, ...], usual: bool) -> None:
    if usual and rows:  # sizes and data that can be fitted, with the losses drawn
        drawn = [rows[i % len(rows)] for i in range(9)]
        rows = [(10 ** (7 + i % 3), 10 ** (9 + i // 3), row[2] + i / 99, row[3]) for i, row in enumerate(drawn)]
    path = tmp_path / "any.csv"
    path.write_text(
        "\n".join(["N,D,L,arch,C", *(",".join(map(str, (*row, f"1e{18 + i % 2}"))) for i, row in enumerate(rows))])
    )
    result = scale("fit", path, *NAMES, "--bootstrap", "3", "--at", "1e20", "--json", "-", *options)
    assert result.exception is None or type(result.exception) is ValueError, result.exception
    if result.exception is None:
        assert json.loads(result.stdout)
    else:
        assert str(result.exception).strip()
        assert "\n" not in str(result.exception)


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


def test_where_leaves_rows_out(runs: Path) -> None:
    found = json.loads(scale("fit", runs, *NAMES, *QUICK, "--where", "arch == 'mamba' and N > 1e8").stdout)
    kept = [
        line for line in runs.read_text().splitlines()[1:] if line.startswith("mamba") and float(line.split(",")[1]) > 1e8
    ]
    assert found["points"] == len(kept) < 32


def test_each_combination_of_groups_is_fitted(tmp_path: Path) -> None:
    points = grid(noise=0.003)
    arch, data = np.where(np.arange(64) % 2, "mamba", "hyena"), np.where(np.arange(64) // 32 % 2, "c4", "code")
    path = write(tmp_path / "runs.csv", "arch,data,N,D,L", arch, data, points.params, points.tokens, points.loss)
    found = json.loads(scale("fit", path, *NAMES, *QUICK, "--group", "arch", "--group", "data").stdout)["groups"]
    assert list(found) == ["hyena, code", "mamba, code", "hyena, c4", "mamba, c4"]
    assert [part["points"] for part in found.values()] == [16] * 4


def test_held_out_runs_are_predicted(runs: Path, tmp_path: Path) -> None:
    params, tokens = np.array([2e10, 4e10]), np.array([4e11, 1e12])
    truth = SURFACE.loss(params, tokens)
    held_out = write(tmp_path / "held_out.csv", "arch,N,D,L", ["mamba", "mamba"], params, tokens, truth * [1.0, 1.1])
    found = json.loads(scale("fit", runs, *NAMES, *QUICK, "--predict", held_out).stdout)["predicted"]
    fitted = np.array([row["predicted"] for row in found["runs"]])
    assert fitted == pytest.approx(truth, rel=0.01)
    assert [row["relative_error"] for row in found["runs"]] == pytest.approx(fitted / (truth * [1.0, 1.1]) - 1)
    assert found["mean_absolute_error"] == pytest.approx(np.abs(fitted - truth * [1.0, 1.1]).mean())
    assert found["runs"][1]["place"] == "held_out.csv, line 3"
    printed = scale("fit", runs, *NAMES, "--bootstrap", "0", "--predict", held_out, "--group", "arch")
    assert printed.output.count("Held-out runs: mamba") == 1
    assert "Held-out runs: hyena" not in printed.output


def test_held_out_runs_of_no_fit_are_named(runs: Path, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held_out.csv", "arch,N,D,L", ["rwkv"], [1e9], [1e10], [3.0])
    assert (
        "warning: rwkv: held-out runs of no fit"
        in scale("fit", runs, *NAMES, "--bootstrap", "0", "--group", "arch", "--predict", held_out).stderr
    )


def test_what_held_out_runs_need(runs: Path, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held_out.csv", "N,D,loss", [1e9], [1e10], [3.0])
    assert "held_out.csv: there is no column 'L'" in refused("fit", runs, *NAMES, "--predict", held_out)
    assert "--predict takes the surface" in refused("fit", runs, *NAMES, "--approach", "1", "--predict", held_out)
    assert "two objectives" in refused("fit", runs, *NAMES, "--lad", "--squares")


def test_squares_of_the_loss_find_their_minimum(runs: Path) -> None:
    """By scipy, on the loss itself; squares of its logarithm have another one."""
    from scipy.optimize import least_squares

    found = json.loads(scale("fit", runs, *NAMES, *QUICK, "--squares").stdout)
    params, tokens, loss = np.loadtxt(runs, delimiter=",", skiprows=1, usecols=(1, 2, 4)).T

    def residuals(theta: Any) -> Any:
        return theta[0] + np.exp(theta[1]) * params ** -theta[3] + np.exp(theta[2]) * tokens ** -theta[4] - loss

    start = [found["E"], np.log(found["A"]), np.log(found["B"]), found["alpha"], found["beta"]]
    best = least_squares(residuals, [1.5, 6, 6, 0.3, 0.3], x_scale=[1, 1, 1, 0.1, 0.1], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert found["objective"] == pytest.approx((residuals(start) ** 2).sum(), rel=1e-9)
    assert found["objective"] == pytest.approx(2 * best.cost, rel=1e-8)
    assert found["loss_function"] == "squares of the loss"
    assert found["convergence"]["converged"]
    for name in ("E", "alpha"):
        assert found["intervals"]["profile"][name]["low"] < found[name] < found["intervals"]["profile"][name]["high"]
    logarithm = json.loads(scale("fit", runs, *NAMES, *QUICK, "--delta", "1").stdout)
    assert abs(logarithm["alpha"] / found["alpha"] - 1) > 1e-4


def test_predictions_of_gadre_et_al(tmp_path: Path) -> None:
    """0.710 % and 0.732 % (arXiv 2403.08540), from five runs on RedPajama. The table: of each run in their repository the
    data set, the multiple of 20 tokens per parameter, parameters, tokens, and the loss on C4's validation set."""
    if not GADRE.exists():
        pytest.skip(f"no {GADRE}")
    head, *lines = GADRE.read_text().splitlines()
    held_out = tmp_path / "held_out.csv"
    chosen = ("rpj,open_lm_1b,32.0,", "rpj,open_lm_7b,1.0,")
    held_out.write_text("\n".join([head, *(line for line in lines if line.startswith(chosen))]) + "\n")
    fitted = "dataset == 'rpj' and (multiplier == 1 and params < 1e9 or multiplier == 16 and params < 2e7)"
    names = ["--loss", "c4_loss", "--squares", "--tied", "--bootstrap", "0", "--json", "-"]
    found = json.loads(scale("fit", GADRE, *names, "--where", fitted, "--predict", held_out).stdout)
    assert found["points"] == 5
    errors = [100 * row["relative_error"] for row in found["predicted"]["runs"]]
    assert errors == pytest.approx([0.7103, 0.7320], abs=5e-5)
