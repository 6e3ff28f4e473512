"""Differences between architectures, state, overtraining, shares of attention, and MAD scores against losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from scaling_points import ARCHS, SURFACE, write_runs, write_scores
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.scaling.fits import beyond_size, correlate as related
from madkernels.scaling.fits.compare import BootstrapOptions, compare, frontiers
from madkernels.scaling.fits.form import Surface
from madkernels.scaling.fits.isoflop import Best
from madkernels.scaling.fits.runs_table import Columns, read_table

COLUMNS = Columns("params", "loss", "tokens", "flops")


def scale(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["scale", *map(str, arguments)], env={"COLUMNS": "220"})


def crossing_of(one: Surface, other: Surface) -> float:
    computes = np.geomspace(1e18, 1e20, 4001)
    gaps = [other.optimum(c).loss - one.optimum(c).loss for c in computes]
    return float(computes[np.abs(gaps).argmin()])


# ---- compare


def test_differences_are_those_of_the_surfaces(tmp_path: Path) -> None:
    by_name, dropped = frontiers(
        read_table(write_runs(tmp_path / "runs.csv")), COLUMNS, "architecture", "budget", BootstrapOptions("cubic")
    )
    assert not dropped
    mamba, striped = compare(by_name)
    assert (mamba.base, mamba.architecture, striped.architecture) == ("transformer", "mamba", "striped")
    for budget, found in mamba.losses.items():
        true = ARCHS["mamba"][1].optimum(budget).loss - ARCHS["transformer"][1].optimum(budget).loss
        assert found.interval is not None
        assert found.interval.low < true < found.interval.high
        assert found.value == pytest.approx(true, abs=0.01)
    assert mamba.exponent is not None
    assert mamba.exponent.interval is not None
    assert mamba.exponent.interval.low < 0 < mamba.exponent.interval.high, "all surfaces have one exponent"
    assert not mamba.exponent.told_apart
    assert all(found.told_apart for found in striped.losses.values())
    assert striped.crossing is not None
    assert striped.crossing.flops is None, "one is better at every budget"
    assert striped.crossing.share == 0


def test_a_crossing_is_found_with_its_interval(tmp_path: Path) -> None:
    by_name, _ = frontiers(
        read_table(write_runs(tmp_path / "runs.csv")), COLUMNS, "architecture", "budget", BootstrapOptions("cubic")
    )
    mamba, _ = compare(by_name)
    true = crossing_of(ARCHS["transformer"][1], ARCHS["mamba"][1])
    assert 1e18 < true < 1e20
    assert mamba.crossing is not None
    assert mamba.crossing.flops is not None
    within = mamba.crossing.flops.interval
    assert within is not None
    assert within.low < true < within.high
    assert mamba.crossing.share > 0.95


def test_compare_command(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.csv")
    result = scale("compare", path, "--bootstrap", "50")
    assert result.exit_code == 0, result.output
    assert "Difference to transformer" in result.output
    assert "not within the budgets" in result.output
    found = json.loads(scale("compare", path, "--bootstrap", "50", "--json", "-").stdout)
    assert set(found["architectures"]) == set(ARCHS)
    assert len(found["differences"][0]["losses"]) == 3
    one = tmp_path / "one.csv"
    lines = path.read_text().splitlines()
    one.write_text("\n".join([lines[0], *(line for line in lines if ",mamba," in line)]))
    assert "comparing takes two architectures" in str(scale("compare", one).exception)
    assert "no column 'family'" in str(scale("compare", path, "--group", "family").exception)
    few = tmp_path / "few.csv"
    few.write_text("\n".join(lines[:3]))
    assert "transformer: no budget has enough sizes" in str(scale("compare", few).exception)


def test_a_failed_run_is_told_and_the_rest_compared(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.csv")
    lines = path.read_text().splitlines()
    cells = lines[3].split(",")
    lines[3] = ",".join([*cells[:-2], "", "failed"])
    path.write_text("\n".join(lines))
    result = scale("compare", path, "--bootstrap", "20")
    assert result.exit_code == 0
    assert "runs.csv, line 4: dropped: the run is failed" in result.stderr


def with_loss(path: Path, architecture: str, loss: str) -> int:
    """Of the largest size at 1e19 FLOPs; the line."""
    lines = path.read_text().splitlines()
    row = max(i for i, line in enumerate(lines) if line.startswith(f"isoflop,{architecture},") and ",1e+19,1e+19," in line)
    lines[row] = ",".join([*lines[row].split(",")[:-2], loss, "done"])
    path.write_text("\n".join(lines) + "\n")
    return row + 1


def test_a_diverged_run_is_told_and_dropped_where_asked(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.csv")
    clean = scale("compare", path, "--bootstrap", "20", "--json", "-")
    assert clean.stderr == "note: 6 rows of ladders (column kind: overtrained, state) are excluded\n"
    line = with_loss(path, "mamba", "10.0")
    result = scale("compare", path, "--bootstrap", "20", "--json", "-")
    assert f"warning: mamba: runs.csv, line {line}: the loss 10 is far from the 3.1" in result.stderr
    assert "mamba: budget 1e+19: the curve's minimum, " in result.stderr
    assert "lies below every run of it" in result.stderr
    found = json.loads(result.stdout)["architectures"]
    assert len(found["mamba"]["warnings"]) == 2
    assert not found["striped"]["warnings"]
    for option in (("--max-loss", "5"), ("--drop-highest", "1")):
        result = scale("compare", path, "--bootstrap", "20", *option, "--json", "-")
        assert f"runs.csv, line {line}: dropped: the loss is 10" in result.stderr
        best, true = (json.loads(out)["architectures"]["mamba"]["best"][1] for out in (result.stdout, clean.stdout))
        assert best["loss"] == pytest.approx(true["loss"], rel=2e-3)
        assert not json.loads(result.stdout)["architectures"]["mamba"]["warnings"]


def test_architectures_that_cannot_be_told_do_not_end_the_others(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1].replace("transformer", "single").replace("isoflop,", "isoflop,", 1)]) + "\n")
    for command in ("compare", "correlate", "report"):
        scores = [write_scores(tmp_path / "results.csv")] if command == "correlate" else []
        quick = [] if command == "correlate" else ["--bootstrap", "20"]
        out = ["--out", tmp_path / "page.html"] if command == "report" else ["--json", "-"]
        result = scale(command, *scores, path, *quick, *out)
        assert result.exit_code == 0, result.output
        told = (tmp_path / "page.html").read_text() if command == "report" else result.stderr
        assert "single: " in told
        assert "no budget has enough sizes" in told
    assert set(json.loads(scale("compare", path, "--bootstrap", "20", "--json", "-").stdout)["architectures"]) == set(ARCHS)


def test_losses_and_best_sizes_are_shown(tmp_path: Path) -> None:
    output = scale("compare", write_runs(tmp_path / "runs.csv"), "--bootstrap", "20").output
    assert "Least loss at each budget" in output
    assert "│ striped      │  1e+20 │" in output


def test_runs_without_a_column_of_flops(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.csv")
    path.write_text(path.read_text().replace(",flops,", ",seen,"))
    assert scale("compare", path, "--bootstrap", "20").exit_code == 0
    assert "no column 'seconds'" in str(scale("compare", path, "--flops", "seconds").exception)


# ---- state, overtraining, hybrids


def test_state_law_is_recovered() -> None:
    sizes = np.geomspace(1e3, 1e5, 12)
    noise = 0.01 * np.random.default_rng(0).standard_normal(12)
    found = beyond_size.state_law(sizes, np.log(50 * sizes**-0.28) + noise)
    assert found.law.exponent == pytest.approx(-0.28, abs=0.01)
    assert found.law.at(1e4) == pytest.approx(50 * 1e4**-0.28, rel=0.02)
    assert found.interval is not None
    assert found.interval.low < -0.28 < found.interval.high
    with pytest.raises(ValueError, match="one size of state"):
        beyond_size.state_law(np.full(3, 4096.0), np.ones(3))
    assert beyond_size.state_law(np.array([1.0, 2.0]), np.array([2.0, 1.0])).interval is None


def test_overtrained_gap() -> None:
    best = [Best(c, c, o.params, o.tokens, o.loss) for c in np.geomspace(1e18, 1e22, 9) if (o := SURFACE.optimum(c))]
    optimum = SURFACE.optimum(1e20)
    tokens = optimum.tokens * np.array([1.0, 4.0, 16.0])
    params = np.full(3, optimum.params)
    rows = beyond_size.overtrained(params, tokens, 6 * params * tokens, SURFACE.loss(params, tokens), best)
    assert rows[0].ratio == pytest.approx(1, rel=1e-3)
    assert rows[0].gap == pytest.approx(0, abs=0.02)
    assert rows[0].gap < rows[1].gap < rows[2].gap
    assert [row.beyond for row in rows] == [False, False, False]
    beyond = beyond_size.overtrained(params[:1], 1e4 * tokens[:1], 6e4 * params[:1] * tokens[:1], np.ones(1), best)
    assert beyond[0].beyond
    with pytest.raises(ValueError, match="fewer than two budgets"):
        beyond_size.overtrained(params, tokens, 6 * params * tokens, np.ones(3), best[:1])


def test_hybrid_ratio() -> None:
    assert beyond_size.attention_share("hyena swiglu attention:heads=4 swiglu mamba mamba") == 0.25
    shares = np.repeat([0, 0.125, 0.25, 0.5, 1], 3)
    loss = 2 + (shares - 0.3) ** 2 + 0.01 * np.random.default_rng(0).standard_normal(15)
    found = beyond_size.hybrid_ratio(shares, loss)
    assert found.share == pytest.approx(0.3, abs=0.03)
    assert found.interval is not None
    assert found.interval.low < 0.3 < found.interval.high
    with pytest.raises(ValueError, match="at an edge"):
        beyond_size.hybrid_ratio(shares, 2 - shares)
    with pytest.raises(ValueError, match="2 shares"):
        beyond_size.hybrid_ratio(shares[:6], loss[:6])


# ---- correlate


def test_coefficients_and_exact_p() -> None:
    scores = {"recall": {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, "flat": dict.fromkeys("abcd", 1.0)}
    recall, flat = related.correlate(scores, {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0, "unscored": 9.0})
    assert flat.coefficients is None
    assert recall.coefficients is not None
    for found in recall.coefficients.values():
        assert found.value == pytest.approx(-1)
        assert found.p == pytest.approx(2 / 24), "two of 24 orders are as far"
        assert found.interval is None, "four architectures are too few"
    many = {str(i): float(i) for i in range(12)}
    rng = np.random.default_rng(0)
    noisy = related.correlate({"t": many}, {name: -value + rng.standard_normal() for name, value in many.items()})[0]
    assert noisy.coefficients is not None
    within = noisy.coefficients["pearson"].interval
    assert within is not None
    assert -1 <= within.low < noisy.coefficients["pearson"].value < within.high < 0
    with pytest.raises(ValueError, match="fewer than three architectures"):
        related.correlate({"t": many}, {"1": 1.0, "2": 2.0})


def test_correlate_command(tmp_path: Path) -> None:
    runs, scores = write_runs(tmp_path / "runs.csv"), write_scores(tmp_path / "results.csv")
    result = scale("correlate", scores, runs)
    assert result.exit_code == 0, result.output
    assert "3 architectures are too few for intervals" in " ".join(result.output.split())
    found = json.loads(scale("correlate", scores, runs, "--at", "1e18", "--json", "-").stdout)
    assert found["budget"] == 1e18
    assert [row["task"] for row in found["tasks"]] == ["recall", "compression", "mad_score"]
    assert found["tasks"][1]["coefficients"] is None, "all have one score"
    assert found["tasks"][2]["count"] == 3
    assert "no run has the budget 5e+18; there are: 1e+18, 1e+19, 1e+20" in str(
        scale("correlate", scores, runs, "--at", "5e18").exception
    )


def test_scores_that_do_not_match(tmp_path: Path) -> None:
    labels = {name: arch for name, (arch, _) in ARCHS.items()}
    scores = write_scores(tmp_path / "results.csv")
    scores.write_text(scores.read_text() + "mamba:dstate=4 mamba,0.1,0.4,0.2,0.1,0.1,0.1,1000,4096,2000.0\n")
    with pytest.raises(ValueError, match="several scores are of mamba"):
        related.read_scores(read_table(scores), labels)
    scores.write_text("arch,recall,mad_score\ndeltanet,1,1\n")
    with pytest.raises(ValueError, match="none of the scored architectures"):
        related.read_scores(read_table(scores), labels)
    scores.write_text("arch,recall\nmamba mamba,0.5\nmamba hyena mamba hyena,0.2\n3*(mamba hyena) hyena,1\n")
    proportions = {"half": "mamba hyena", "pure": "mamba:dstate=4"}
    assert related.read_scores(read_table(scores), proportions) == {"recall": {"pure": 0.5, "half": 0.2}}
    with pytest.raises(ValueError, match="others have the layers of half too: give scores a column architecture"):
        related.read_scores(read_table(scores), proportions | {"other half": "2*(hyena mamba)"})
    scores.write_text("architecture,recall\nmamba,0.5\nother,1\n")
    assert related.read_scores(read_table(scores), labels) == {"recall": {"mamba": 0.5}}


def test_command_shows_losses_sizes_and_exponents(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs.csv")
    place = tmp_path / "found.json"
    arguments = ["scale", "compare", str(runs), "--bootstrap", "50", "--json", str(place)]
    printed = CliRunner().invoke(app, arguments).stdout
    for name, found in json.loads(place.read_text())["architectures"].items():
        rows = [line for line in printed.splitlines() if line.startswith(f"│ {name} ")]
        assert f"│ {found['a']:.3f} │" in rows[0]
        for row, best in zip(rows, found["best"], strict=True):
            assert f"│ {best['loss']:.4f} │" in row
            assert f"{best['params']:.3g} │" in row
