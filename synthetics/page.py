"""Results as one HTML page: no script, no file beside it, pictures inside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from madkernels import pages
from madkernels.models.layers import Layer
from madkernels.models.spec import SpecError, parse
from madkernels.runs.store import OPEN
from madkernels.synthetics import published
from madkernels.synthetics.protocol import MEASURES, Results, best_runs, mad_score, margin, mean, results_of, scores
from madkernels.synthetics.report import costs_of, label, percent, unfair
from madkernels.synthetics.tasks import Task


def write_page(rows: Sequence[dict[str, Any]], path: Path, title: str = "MAD scores") -> None:
    """The rows of a results file (:meth:`madkernels.runs.store.Results.latest`) as a page."""
    path.write_text(page(rows, title), encoding="utf-8")


def page(rows: Sequence[dict[str, Any]], title: str) -> str:
    results = results_of(rows)
    if not results:
        raise ValueError("there are no runs to report")
    colours = dict(zip(scores(results), cycle(pages.COLOURS), strict=False))
    sections = [
        _heading(title, rows),
        _gaps(rows),
        "<h2>Scores</h2>"
        + _score_table(results, colours)
        + pages.figure(_draw_scores(results, colours), "Test accuracy by task."),
        "<h2>Difficulty</h2>" + _difficulty(results, colours),
        "<h2>Training</h2>" + _training(rows, colours),
        "<h2>Architectures and cost</h2>" + _cost_table(results) + _diagrams(colours),
        "<h2>Beside what is published</h2>" + _published(results),
    ]
    return pages.document(title, sections)


# ---- sections


def _heading(title: str, rows: Sequence[dict[str, Any]]) -> str:
    runs = [row["run"] for row in rows]
    seeds, widths = sorted({r.training.seed for r in runs}), sorted({r.training.dim for r in runs})
    settings = len({r.task for r in runs})
    select = ", ".join(sorted({r.training.select for r in runs}))
    facts = (
        f"{len(runs)} runs: {settings} settings of {len({r.task.name for r in runs})} tasks, {len(seeds)} seed"
        f"{'s' if len(seeds) > 1 else ''}, width {', '.join(map(str, widths))}. Runs were chosen on the {select} set. "
        f"madkernels {pages.text(rows[0]['config']['version'])}."
    )
    return f'<h1>{pages.text(title)}</h1><p class="note">{facts}</p>'


def _gaps(rows: Sequence[dict[str, Any]]) -> str:
    """What is missing, said before any score."""
    lines = []
    if open_runs := sum(row["status"] in OPEN for row in rows):
        lines.append(f"{open_runs} of {len(rows)} runs have no result yet; scores with a star lack settings.")
    failed = [row for row in rows if row["status"] == "failed"]
    lines += [f"Failed: {row['run'].task}: {label(row['run'].arch)}: {row['error']}" for row in failed]
    lines += [f"Not a fair comparison: {line}." for line in unfair(costs_of([(r["run"], r["metrics"]) for r in rows]))]
    return pages.gaps(lines)


def _named(arch: str, colours: dict[str, str]) -> str:
    return pages.swatch(label(arch), colours[arch])


def _score_table(results: Results, colours: dict[str, str]) -> str:
    found = ""
    for measure in MEASURES:
        by_arch = scores(results, measure)
        tasks = list(dict.fromkeys(run.task.name for run, _ in results))
        ranked = sorted(by_arch, key=lambda arch: -(mad_score(by_arch[arch]).value or 0))
        lines = [
            [_named(arch, colours), *(percent(by_arch[arch].get(task)) for task in tasks), percent(mad_score(by_arch[arch]))]
            for arch in ranked
        ]
        found += f"<h3>{measure.replace('_', ' ').capitalize()}, percent</h3>" + pages.table(
            ["", *tasks, "MAD score"], lines
        )
    known = len({run.training.seed for run, _ in results}) > 1
    return found + f'<p class="note">{"± 95 % intervals over seeds (Student)." if known else "One seed: no intervals."}</p>'


def _draw_scores(results: Results, colours: dict[str, str]) -> Figure:
    by_arch = scores(results)
    tasks = list(dict.fromkeys(run.task.name for run, _ in results))
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots()
    width = 0.8 / len(by_arch)
    for i, (arch, by_task) in enumerate(by_arch.items()):
        drawn = [(n, score) for n, task in enumerate(tasks) if (score := by_task.get(task)) and score.value is not None]
        places = [n + (i - (len(by_arch) - 1) / 2) * width for n, _ in drawn]
        heights = [100 * (score.value or 0) for _, score in drawn]
        errors = [100 * (score.margin or 0) for _, score in drawn]
        axes.bar(places, heights, width, yerr=errors if any(errors) else None, color=colours[arch])
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, percent")
    pages.finish(axes)
    handles = [Patch(color=colour, label=label(arch)) for arch, colour in colours.items()]
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _difficulty(results: Results, colours: dict[str, str]) -> str:
    """For each task a curve along each variable that its settings change."""
    best = best_runs(results)
    found = ""
    for name in dict.fromkeys(run.task.name for run, _ in results):
        settings = list(dict.fromkeys(run.task for run, _ in results if run.task.name == name))
        variables = [k for k in settings[0].options() if len({getattr(s, k) for s in settings}) > 1]
        if not variables:
            continue
        figure = Figure(figsize=(3.4 * len(variables), 2.6), layout="constrained")
        for axes, variable in zip(figure.subplots(1, len(variables), squeeze=False)[0], variables, strict=True):
            along = sorted(_along(settings, variable), key=lambda s: getattr(s, variable))
            for arch in colours:
                _draw_along(axes, arch, along, variable, best, colours[arch])
            axes.set_xlabel(variable)
            axes.set_ylim(0, 102)
            pages.finish(axes)
        found += pages.figure(figure, f"{name}: accuracy, percent, as one variable changes.")
    return found or '<p class="note">Every task has one setting.</p>'


def _along(settings: Sequence[Task], variable: str) -> list[Task]:
    """The baseline, and the settings that differ from it in this variable only."""
    base = settings[0].options()
    return [s for s in settings if all(v == base[k] for k, v in s.options().items() if k != variable)]


def _draw_along(axes: Axes, arch: str, along: Sequence[Task], variable: str, best: Any, colour: str) -> None:
    places, middles, errors = [], [], []
    for setting in along:
        values = [100 * b[1]["accuracy"] for (a, task, _), b in best.items() if b and a == arch and task == setting]
        if values:
            places.append(getattr(setting, variable))
            middles.append(mean(values))
            errors.append(margin(values) or 0.0)
    if places:
        axes.errorbar(places, middles, yerr=errors if any(errors) else None, marker="o", ms=4, color=colour)


def _training(rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    """The training curve of the best run, at the first setting of each task."""
    curves = {row["run"]: row["curve"] for row in rows if row["curve"]}
    results = results_of(rows)
    best = best_runs(results)
    tasks = list({run.task.name: run.task for run, _ in reversed(results)}.values())[::-1]
    figure = Figure(figsize=(3.4 * len(tasks), 4.6), layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        for arch, colour in colours.items():
            chosen = next((b[0] for (a, t, _), b in best.items() if b and a == arch and t == task), None)
            if chosen not in curves:
                continue
            points = curves[chosen]
            epochs = range(1, len(points) + 1)
            grid[0][column].plot(epochs, [p["loss"] for p in points], color=colour)
            grid[1][column].plot(epochs, [100 * p["held_out_accuracy"] for p in points], color=colour)
        grid[0][column].set_title(task.name, fontsize=10)
        grid[1][column].set_xlabel("epoch")
        grid[1][column].set_ylim(0, 102)
        for axes in (grid[0][column], grid[1][column]):
            pages.finish(axes)
    grid[0][0].set_ylabel("training loss, nats")
    grid[1][0].set_ylabel("held-out accuracy, percent")
    return pages.figure(figure, "The best run of each architecture at the first setting of each task.")


def _cost_table(results: Results) -> str:
    lines = []
    by_arch = scores(results)
    for arch, cost in costs_of(results).items():
        figures = [f"{cost.parameters:,}", f"{cost.state:,}", f"{cost.flops:,.0f}"] if cost else ["-"] * 3
        seconds = [m["seconds"] for run, m in results if run.arch == arch and m]
        times = [f"{sum(seconds) / 60:,.0f}"] if seconds else ["-"]
        lines.append([pages.text(label(arch)), percent(mad_score(by_arch[arch])), *figures, *times])
    head = ["", "MAD score", "parameters", "state", "FLOPs per token", "minutes"]
    length = results[0][0].task.length
    note = f"Parameters of the layers; state, and forward FLOPs, for a sequence of length {length}; time of all runs."
    return pages.table(head, lines) + f'<p class="note">{note}</p>'


def _diagrams(colours: dict[str, str]) -> str:
    found = ""
    for arch in colours:
        try:
            layers = [(str(spec), _colour_of(spec.layer)) for spec in parse(arch).layers]
        except SpecError:  # a layer from outside that is not here
            layers = [(name, pages.COLOURS[0]) for name in arch.split(" ")]
        boxes = " → ".join(f'<span style="border-color:{colour}">{pages.text(name)}</span>' for name, colour in layers)
        found += f'<div class="stack">tokens → {boxes} → logits</div>'
    return found + pages.note("Framed orange: attention; blue: other mixers of the sequence; grey: mixers of channels.")


def _colour_of(layer: type[Layer]) -> str:
    """Mixers of channels grey, attention orange, other mixers of the sequence blue."""
    return "#999" if layer.mixes == "channel" else pages.COLOURS[1] if layer.is_attention else pages.COLOURS[0]


def _published(results: Results) -> str:
    """Scores beside the published ones, over the tasks that have both."""
    rows, by_arch = published.published(), scores(results)
    tasks = [
        task for task in dict.fromkeys(run.task.name for run, _ in results) if all(task in r.tasks for r in rows.values())
    ]
    if not tasks:
        return pages.note("None of these tasks has published scores.")
    ours = {}
    for arch, by_task in by_arch.items():
        values = [score.value for task in tasks if (score := by_task.get(task)) and score.value is not None]
        if values and (name := published.family(arch)):
            ours[name] = mean(values)
    theirs = {name: mean([row.tasks[task] for task in tasks]) for name, row in rows.items()}
    lines = [
        [
            pages.text(name),
            f"{100 * ours[name]:.1f}" if name in ours else "-",
            f"{100 * theirs[name]:.1f}",
            f"{100 * row.mad:.1f}",
            "-" if row.perplexity is None else f"{row.perplexity:.2f}",
            pages.text(row.source),
        ]
        for name, row in rows.items()
    ]
    head = ["", f"here, over {len(tasks)} tasks", "published, these tasks", "published, all tasks", "perplexity", "source"]
    agreed = published.agreement(ours, theirs)
    told = "Fewer than three architectures are published ones: no agreement can be given."
    if agreed:
        told = (
            f"Rank agreement with the published scores on these tasks, {agreed.count} architectures: "
            f"Spearman {agreed.spearman:+.2f}, Kendall {agreed.kendall:+.2f}."
        )
    linked = published.score_against_perplexity()
    assert linked
    known = (
        f"Published scores against perplexity, {linked.count} architectures of one family: Pearson {linked.pearson:+.2f}, "
        f"Spearman {linked.spearman:+.2f}."
    )
    notes = [told, known, *(f"{name}: {text}" for name, text in published.sources().items())]
    return pages.table(head, lines) + "".join(f'<p class="note">{pages.text(note)}</p>' for note in notes)
