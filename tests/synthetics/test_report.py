"""Tables, the page, and what of a sweep is told."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import assert_fits
from rich.console import Console
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.runs.store import Results, Store
from madkernels.synthetics import published, report
from madkernels.synthetics.page import page
from madkernels.synthetics.protocol import Run, Training, results_of
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.recall import Recall

ARCHS = ["attention:heads=2 swiglu", "mamba:dstate=4 mamba:dstate=4", "hyena swiglu attention:heads=2 swiglu"]
TASKS = [Recall(8, 8, 64), Recall(12, 8, 64), Compression(6, 8, 64)]
TINY = Training(lr=1e-3, epochs=2, batch=16, dim=16, held_out=32)


def runs() -> list[Run]:
    trainings = [dataclasses.replace(TINY, seed=seed) for seed in (1, 2)]
    return [Run(arch, task, training) for arch in ARCHS for task in TASKS for training in trainings]


def measured(run: Run) -> dict[str, Any]:
    """An accuracy that follows from architecture, task and seed."""
    accuracy = 0.3 + 0.2 * ARCHS.index(run.arch) + 0.05 * TASKS.index(run.task) + 0.01 * run.training.seed
    curve = [{"loss": 2.0, "held_out_accuracy": 0.1}, {"loss": 1.0, "held_out_accuracy": accuracy}]
    return {
        "accuracy": accuracy, "macro_accuracy": accuracy / 2, "loss": 1.0, "held_out_accuracy": accuracy, "epochs": 2,
        "seconds": 1.5, "data_seconds": 0.01, "curve": curve,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All done but three: one failed, one under way, one not begun."""
    store = Store(tmp_path)
    store.plan(runs())
    for run in runs()[:-3]:
        store.start(run)
        store.finish(run, measured(run))
    store.start(runs()[-3])
    store.fail(runs()[-3], "the loss is nan in epoch 1 <b>")
    store.start(runs()[-2])
    store.close()
    return tmp_path


@pytest.fixture
def rows(folder: Path) -> list[dict[str, Any]]:
    return Results(folder).latest(Run.of)


def shown(table: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


class Tags(HTMLParser):
    """Refuses tags that do not close, and anything from outside the page."""

    VOID = ("meta", "br", "link", "img", "path", "use", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith("#"), f"{tag} {name}={value}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_stands_by_itself(rows: list[dict[str, Any]]) -> None:
    text = page(rows, "A <title>")
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not {"link", "img", "iframe"} & set(tags.seen)
    assert tags.seen.count("script") == 1
    assert tags.seen.count("svg") == 8  # the MAD score and two tasks; recall by vocabulary; two curves of each task
    assert "A &lt;title&gt;" in text
    assert "the loss is nan in epoch 1 &lt;b&gt;" in text
    assert page(rows, "A <title>") == text, "the same results give the same page"


def test_page_fits_every_window(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert_fits(page(rows, "MAD scores"), tmp_path)


def test_page_tells_what_is_missing(rows: list[dict[str, Any]]) -> None:
    text = page(rows, "t")
    assert "2 of 18 runs have no result yet" in text
    assert "Failed: compression vocab_size=6" in text or "Failed: recall vocab_size=12" in text
    assert text.count("The sizes are not equal: hyena swiglu attention:heads=2 swiglu keeps") == 1
    assert "One seed" not in text
    assert re.search(r'<td data-label="recall">\d+\.\d ± \d+\.\d</td>', text)
    whole = page([r for r in rows if r["run"].arch == ARCHS[0]], "t")
    assert 'class="gap"' not in whole


def test_page_ranks_and_compares_with_what_is_published(rows: list[dict[str, Any]]) -> None:
    text = page(rows, "t")
    table = text[text.index("<table") : text.index("</table>")]
    assert re.findall(r'<th scope="col">([^<]+)', table)[:2] == ["architecture", "MAD score"]
    order = [table.index(name) for name in ("2*mamba:dstate=4", ">attention:heads=2 swiglu", "hyena swiglu attention")]
    assert order == sorted(order), "the best first; the last lacks a task, so it has no score"
    assert "Rank agreement with the published scores on these tasks, 3 architectures" in text


def test_tables(rows: list[dict[str, Any]]) -> None:
    results = results_of(rows)
    text = shown(report.table(results))
    assert "Some settings have no result yet" in text
    assert "34.0 ± 6.4" in text  # recall of the first: means 33.5 and 34.5 over two settings; 12.706 / 2
    compared = shown(report.compare(results))
    assert "Difference to attention:heads=2 swiglu" in compared
    assert "+20.0 ± 0.0 !" in compared
    with pytest.raises(ValueError, match="takes two architectures"):
        report.compare([r for r in results if r[0].arch == ARCHS[0]])


def test_commands(folder: Path) -> None:
    wide = {"COLUMNS": "200"}
    for arguments, said in (
        (["status"], "15 of 18 runs are done"),
        (["compare", "--measure", "macro_accuracy"], "+10.0 ± 0.0 !"),
        (["report"], "report.html"),
    ):
        result = CliRunner().invoke(app, ["mad", *arguments, "--out", str(folder)], env=wide)
        assert result.exit_code == 0, result.output
        assert said in result.output
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    result = CliRunner().invoke(app, ["mad", "normalise", "--arch", "4*mamba", "--state", "4096"], env=wide)
    assert "mamba:dstate=4 mamba:dstate=4 mamba:dstate=4 mamba:dstate=4" in " ".join(result.output.split())
    assert "4,096" in result.output


def test_published_figures_go_together_as_stated() -> None:
    """Of research on the published scatter: Pearson -0.98, rank correlation -1; by task as listed."""
    linked = published.score_against_perplexity()
    assert linked is not None
    assert (linked.count, linked.spearman) == (5, pytest.approx(-1))
    assert linked.pearson == pytest.approx(-0.98, abs=0.005)
    by_task = {
        "fuzzy-recall": -0.99, "selective-copying": -0.93, "noisy-recall": -0.87, "recall": -0.86, "compression": -0.83,
    }  # fmt: skip
    for task, pearson in by_task.items():
        found = published.score_against_perplexity(task)
        assert found is not None
        assert found.pearson == pytest.approx(pearson, abs=0.006), task
    for row in published.published().values():
        assert sum(row.tasks.values()) / 6 == pytest.approx(row.mad, abs=0.002), row.name


def test_families() -> None:
    assert published.family("2*(attention:heads=4 swiglu)") == "Transformer"
    assert published.family("hyena moe attention moe") == "Striped Hyena + MoE"
    assert published.family("4*mamba") == "Mamba"
    assert published.family("mamba swiglu") is None
    assert published.family("not-a-layer") is None
    assert published.agreement({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}) is None


def test_labels() -> None:
    assert report.label("mamba mamba mamba") == "3*mamba"
    assert report.label("a b a b") == "2*(a b)"
    assert report.label("a b a") == "a b a"
