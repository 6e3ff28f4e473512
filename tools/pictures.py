"""Draws the pictures of README.md and docs/ and the reports of the studies, from docs/studies and benchmarks/results.

Run by `make pictures`. Training curves are not kept in a CSV file, so the reports of MAD studies are drawn without them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from madkernels.benchmarks.harness import OURS
from madkernels.reporting.figures import COLOURS, Panel, picture
from madkernels.scaling.fits.compare import BootstrapOptions, Frontier, frontiers
from madkernels.scaling.fits.report import budget_colours, isoflop_panels, page as scaling_page
from madkernels.scaling.fits.runs_table import Columns, Table, read_table
from madkernels.synthetics.fields import fields_of
from madkernels.synthetics.page import colours_of, legend_of, page as mad_page, score_panels
from madkernels.synthetics.protocol import Results, Run, Score, Training, results_of, scores
from madkernels.synthetics.tasks import TASKS

ROOT = Path(__file__).parent.parent
STUDIES, RESULTS, PICTURES = ROOT / "docs/studies", ROOT / "benchmarks/results", ROOT / "docs/pictures"
COLUMNS = Columns("params", "loss", "tokens", "flops")
TITLES = {
    "demo": "MAD scores of the demo",
    "strict-small": "MAD, strict-small",
    "scaling-small": "Six architectures on the standard library's source code, byte by byte",
}
PASSES = ("forward", "backward")
BENCHMARKS = {  # a case of each op, and the file of its run
    "selective_scan": ("mamba-130m", "2026-11-23-selective_scan-cpu-2-threads"),
    "causal_conv": ("mamba-130m", "2026-11-23-causal_conv-cpu-2-threads"),
    "fft_conv": ("hyena", "2026-11-24-fft_conv-cpu-2-threads"),
    "attention": ("2k-128-causal", "2026-11-26-attention-cpu-zen5"),
    "grouped_gemm": ("swiglu", "2026-11-26-grouped_gemm-cpu-zen5"),
    "moe_mlp": ("32-experts", "2026-11-26-moe_mlp-cpu-zen5"),
}


def main() -> None:
    for name in ("demo", "strict-small"):
        draw_mad(name)
    draw_scaling("scaling-small")
    draw_tutorial()
    draw_reading()
    draw_benchmarks()


# ---- MAD


def draw_mad(name: str) -> None:
    rows = read_runs(STUDIES / name / "runs.csv")
    results = results_of(rows)
    colours = colours_of(results)
    legend = legend_of(colours)
    panels = score_panels(results, colours)
    picture(PICTURES / f"mad-{name}.svg", panels, legend, columns=len(panels), title="test accuracy, percent")
    (STUDIES / name / "report.html").write_text(mad_page(rows, TITLES[name]), encoding="utf-8")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The rows of a `runs.csv` of `mad run`, as a results file gives them."""
    with path.open(newline="") as file:
        head, *lines = csv.reader(file)
    return [_row(head, line) for line in lines]


def _row(head: Sequence[str], line: Sequence[str]) -> dict[str, Any]:
    split = head.index("status")  # "epochs" stands on both sides: those of the training, and those that it took
    given, measured = dict(zip(head[:split], line[:split], strict=True)), dict(zip(head[split:], line[split:], strict=True))
    options = {kind: _options(kind, given) for kind in (TASKS[given["name"]], Training)}
    task, training = (kind(**values) for kind, values in options.items())
    figures = {name: float(value) for name, value in measured.items() if value and name not in ("status", "error")}
    return {
        "key": given["key"],
        "config": {"version": given["version"]},
        "run": Run(given["arch"], task, training),
        "status": measured["status"],
        "metrics": figures if measured["status"] == "done" else None,
        "curve": None,
        "error": measured["error"],
    }


def _options(kind: type[Any], given: dict[str, str]) -> dict[str, Any]:
    return {name: of(given[name]) for name, of in fields_of(kind).items() if given.get(name)}


# ---- scaling laws


def draw_scaling(name: str) -> None:
    runs, scores = read_table(STUDIES / name / "runs.csv"), read_table(STUDIES / "strict-small/results.csv")
    how = draw_isoflops("isoflop", runs, columns=3)
    page = scaling_page(runs, scores, COLUMNS, "architecture", "budget", how, TITLES[name])
    (STUDIES / name / "report.html").write_text(page, encoding="utf-8")


def draw_isoflops(name: str, runs: Table, columns: int) -> BootstrapOptions:
    """The losses over sizes of each architecture; how the curves through them were laid."""
    how = BootstrapOptions()
    found, _ = frontiers(runs, COLUMNS, "architecture", "budget", how)
    legend = {f"{budget:.3g} FLOPs": colour for budget, colour in budget_colours(found).items()}
    panels, title = isoflop_panels(found, how.shape), "loss, nats per token; stars: minima"
    picture(PICTURES / f"{name}.svg", panels, legend, columns=columns, same_y=True, title=title)
    return how


# ---- tutorials


def draw_tutorial() -> None:
    """The IsoFLOP curves of docs/tutorials/scaling-law.md."""
    draw_isoflops("scaling-law", read_table(ROOT / "docs/tutorials/scaling-law-runs.csv"), columns=2)


def draw_reading() -> None:
    """What docs/tutorials/reports.md points at: seeds and their interval, a minimum among the runs and one below them."""
    results = results_of(read_runs(STUDIES / "strict-small/runs.csv"))
    runs = read_table(STUDIES / "scaling-small/runs.csv")
    found, _ = frontiers(runs, COLUMNS, "architecture", "budget", BootstrapOptions())
    panels = [
        Panel("recall of each seed, percent, and ±", partial(_draw_seeds, results=results)),
        *isoflop_panels({"mamba, 2.7e12 FLOPs: a minimum": at_budget(found["mamba"], 2.7e12)}, "parabola"),
        *isoflop_panels({"transformer++, 9e11: below every run": at_budget(found["transformer++"], 9e11)}, "parabola"),
    ]
    picture(PICTURES / "reading-a-report.svg", panels, legend_of(colours_of(results)), columns=3)


def at_budget(found: Frontier, budget: float) -> Frontier:
    """That budget alone."""
    chosen = [(c, b) for c, b in zip(found.curves, found.best, strict=True) if c.budget == budget]
    return replace(found, curves=[c for c, _ in chosen], best=[b for _, b in chosen])


def _draw_seeds(axes: Axes, results: Results) -> None:
    by_arch: dict[str, Score] = {arch: by_task["recall"] for arch, by_task in scores(results).items()}
    for place, (arch, colour) in enumerate(colours_of(results).items()):
        score = by_arch[arch]
        seeds = [100 * value for value in score.by_seed.values()]
        axes.errorbar(place, 100 * (score.value or 0), yerr=100 * (score.margin or 0), color=colour, capsize=4, lw=1)
        axes.plot([place] * len(seeds), seeds, "o", ms=5, color=colour)
    axes.set_xticks([])


# ---- benchmarks


def draw_benchmarks() -> None:
    panels = [Panel(f"float32, {direction}", partial(_draw_peers, direction=direction)) for direction in PASSES]
    title = "times as fast as the fastest other implementation, named below each op; CPU, 2 threads"
    picture(PICTURES / "benchmarks.svg", panels, columns=2, title=title)


def _draw_peers(axes: Axes, direction: str) -> None:
    times = {f"{op}\n{peer}": ratio for op in BENCHMARKS for peer, ratio in [fastest_peer(op, direction)]}
    bars = axes.barh(range(len(times)), list(times.values()), color=COLOURS[0])
    axes.bar_label(bars, [f"{ratio:.1f}" for ratio in times.values()], padding=3)
    axes.axvline(1, color=COLOURS[1], lw=1)
    axes.set_yticks(range(len(times)), list(times))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.margins(x=0.12)


def fastest_peer(op: str, direction: str) -> tuple[str, float]:
    """The fastest implementation that is not ours, and its time over ours."""
    name, file = BENCHMARKS[op]
    case = next(c for c in json.loads((RESULTS / f"{file}.json").read_text())["cases"] if c["case"]["name"] == name)
    medians = {
        r["contender"]: r["median"]
        for r in case["results"]
        if (r["dtype"], r["direction"]) == ("float32", direction) and r["seconds"]
    }
    mine = medians.pop(OURS)
    peer = min((peer for peer in medians if not peer.startswith("ours")), key=medians.__getitem__)
    return peer, medians[peer] / mine


if __name__ == "__main__":
    main()
