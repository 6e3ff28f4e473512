"""The page of scaling runs: it stands by itself, holds every section there are runs for, and tells what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import assert_fits
from scaling_points import write_runs, write_scores
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.scaling.fits import report
from madkernels.scaling.fits.compare import BootstrapOptions
from madkernels.scaling.fits.report import page
from madkernels.scaling.fits.runs_table import Columns, Table, read_table

HEADS = (
    "Loss against size",
    "Best size",
    "Loss at a budget",
    "Loss surface",
    "State",
    "Overtrained",
    "Share of attention",
)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESAMPLES", 20)


def made(table: Table, scores: Table | None = None) -> str:
    columns = Columns("params", "loss", "tokens", "flops")
    return page(table, scores, columns, "architecture", "budget", BootstrapOptions(resamples=50), "A <title>")


def test_page_fits_every_window(tmp_path: Path) -> None:
    runs, scores = read_table(write_runs(tmp_path / "runs.csv")), read_table(write_scores(tmp_path / "results.csv"))
    assert_fits(made(runs, scores), tmp_path)


def without(path: Path, *parts: str) -> Path:
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *(line for line in lines if not any(part in line for part in parts))]))
    return path


def test_page_stands_by_itself(tmp_path: Path) -> None:
    runs, scores = read_table(write_runs(tmp_path / "runs.csv")), read_table(write_scores(tmp_path / "results.csv"))
    text = made(runs, scores)
    assert all(f"<h2>{head}" in text for head in (*HEADS, "MAD scores"))
    assert text.count("<svg") == 13  # curves 3, best size 2, losses, surfaces 3, state, overtrained, attention, scores
    assert "A &lt;title&gt;" in text
    assert not any(tag in text for tag in ("<link", "<img", "src=", 'href="http'))
    assert 'class="gap"' not in text, "nothing is missing"
    assert "Too few architectures for intervals" in text
    assert made(runs, scores) == text, "the same runs give the same page"


def test_page_tells_what_is_missing(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.csv")
    lines = path.read_text().splitlines()
    lines[2] = ",".join([*lines[2].split(",")[:-2], "", "failed"])
    lines[3] = ",".join([*lines[3].split(",")[:-2], "nan", "done"])
    path.write_text("\n".join(lines))
    text = made(read_table(path))
    assert "runs.csv, line 3: the run is failed" in text
    assert "runs.csv, line 4: the loss is nan: diverged" in text
    write_scores(tmp_path / "results.csv").write_text("arch,recall\nmamba,1\n")
    assert "MAD scores: fewer than three architectures" in made(read_table(path), read_table(tmp_path / "results.csv"))


def test_page_tells_of_diverged_runs_first(tmp_path: Path) -> None:
    path = without(write_runs(tmp_path / "runs.csv"), "mamba", "striped")
    lines = path.read_text().splitlines()
    lines[5] = ",".join([*lines[5].split(",")[:-2], "10", "done"])
    path.write_text("\n".join(lines))
    text = made(read_table(path))
    assert "transformer: runs.csv, line 6: the loss 10 is far from the 3.7" in text
    assert "transformer: budget 1e+18: the curve&#39;s minimum" in text


def test_an_architecture_with_ladders_only_is_shown(tmp_path: Path) -> None:
    """Without a curve over sizes it has no best size; its surface and its ladder stand in the page all the same."""
    path = without(write_runs(tmp_path / "runs.csv"), "transformer", "striped")
    ladder = [line.replace(",mamba,", ",other,") for line in path.read_text().splitlines() if ",mamba," in line]
    path.write_text(
        path.read_text() + "\n" + "\n".join(line.replace("isoflop,", "overtrained,", 1) for line in ladder) + "\n"
    )
    text = made(read_table(path))
    assert "other, overtrained: the optimum is known at fewer than two budgets" in text


def test_sections_without_runs_are_skipped(tmp_path: Path) -> None:
    text = made(read_table(without(write_runs(tmp_path / "runs.csv"), "overtrained", "state,", "transformer")))
    for head in ("State", "Overtrained", "Share of attention", "MAD scores"):
        assert f"<h2>{head}" not in text
    one = made(read_table(without(tmp_path / "runs.csv", "striped")))
    assert "Compared with" not in one


def test_a_surface_that_is_no_fit_is_a_gap(tmp_path: Path) -> None:
    """One budget: on it data follows from size, and four runs are fewer than the parameters."""
    path = without(write_runs(tmp_path / "runs.csv"), ",1e+19,", ",1e+20,", "overtrained", "state,")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[1:5], *lines[6:]]))
    text = made(read_table(path))
    assert "transformer: no surface: 4 points cannot determine 5 parameters" in text


def test_command(tmp_path: Path) -> None:
    runs, out = write_runs(tmp_path / "runs.csv"), tmp_path / "page.html"
    arguments = ["scale", "report", str(runs), "--out", str(out), "--bootstrap", "20", "--title", "Three architectures"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "<h1>Three architectures</h1>" in out.read_text()
    assert CliRunner().invoke(app, arguments).exit_code == 0, "a page may take the place of an earlier one"
    refused = CliRunner().invoke(app, ["scale", "report", str(runs), "--out", str(runs)])
    assert f"{runs} is there already; choose another name, or --force" in str(refused.exception)
    runs.write_text(runs.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="no IsoFLOP runs"):
        made(read_table(runs))
