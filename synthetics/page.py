"""Results as one HTML page: scores first, then what they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from madkernels.models.layers import Layer
from madkernels.models.presets import is_published, resolve
from madkernels.reporting import pages
from madkernels.reporting.figures import COLOURS, GREY, Panel
from madkernels.reporting.pages import Section
from madkernels.runs.store import OPEN
from madkernels.synthetics import published
from madkernels.synthetics.protocol import Results, Run, Score, best_runs, mad_score, margin, mean, results_of, scores
from madkernels.synthetics.report import costs_of, label, percent, unequal
from madkernels.synthetics.tasks import Task

FEW = 3  # points of a curve: up to so many are marked


def write_page(rows: Sequence[dict[str, Any]], path: Path, title: str = "MAD scores") -> None:
    """The rows of a results file (:meth:`madkernels.runs.store.Results.latest`) as a page."""
    path.write_text(page(rows, title), encoding="utf-8")


def page(rows: Sequence[dict[str, Any]], title: str) -> str:
    results = results_of(rows)
    if not results:
        raise ValueError("there are no runs to report")
    colours = colours_of(results)
    sections = [
        scores_section(results, colours),
        _difficulty(results, colours),
        training_section(rows, colours),
        Section("Architectures and cost", [_cost_table(results), *_diagrams(results)]),
        _published(results),
    ]
    return pages.document(title, _facts(rows), _gaps(rows), sections)


def colours_of(results: Results) -> dict[str, str]:
    """A colour for each architecture."""
    return dict(zip(scores(results), cycle(COLOURS), strict=False))


def legend_of(colours: dict[str, str]) -> dict[str, str]:
    """The colours by the labels of the architectures."""
    return {label(arch): colour for arch, colour in colours.items()}


# ---- sections


def _facts(rows: Sequence[dict[str, Any]]) -> str:
    runs = [row["run"] for row in rows]
    seeds, widths = {r.training.seed for r in runs}, sorted({r.training.dim for r in runs})
    settings, tasks = len({r.task for r in runs}), len({r.task.name for r in runs})
    select = ", ".join(sorted({r.training.select for r in runs}))
    return (
        f"{len(runs)} runs: {settings} settings of {tasks} tasks, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, "
        f"width {', '.join(map(str, widths))}. The best run of each setting was chosen on the {select} set. "
        f"madkernels {rows[0]['config']['version']}."
    )


def _gaps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is missing, said before any score."""
    lines = []
    if open_runs := sum(row["status"] in OPEN for row in rows):
        lines.append(f"{open_runs} of {len(rows)} runs have no result yet. A star marks scores that lack some.")
    failed = [row for row in rows if row["status"] == "failed"]
    return lines + [f"Failed: {row['run'].task}: {label(row['run'].arch)}: {row['error']}" for row in failed]


def _named(arch: str, colours: dict[str, str]) -> Markup:
    return pages.swatch(label(arch), colours[arch])


def scores_section(results: Results, colours: dict[str, str]) -> Section:
    seeds = len({run.training.seed for run, _ in results})
    within = f"± half of a 95 % interval over {seeds} seeds (Student)." if seeds > 1 else "One seed, so no intervals."
    about = "Accuracy on test sequences, in percent. The MAD score is the mean over tasks."
    return Section(
        "Scores",
        [
            _score_table(results, colours, "accuracy"),
            pages.note(f"{about} {within} {unequal(costs_of(results))}"),
            pages.figure(score_panels(results, colours), "Test accuracy, percent.", legend_of(colours)),
            pages.heading("Mean over token classes"),
            _score_table(results, colours, "macro_accuracy"),
            pages.note("Each token that can be an answer counts alike here, however often it is one."),
        ],
    )


def _score_table(results: Results, colours: dict[str, str], measure: str) -> Markup:
    by_arch = scores(results, measure)
    tasks = list(dict.fromkeys(run.task.name for run, _ in results))
    ranked = sorted(by_arch, key=lambda arch: -(mad_score(by_arch[arch]).value or 0))
    lines = [
        [_named(arch, colours), _bold(percent(mad_score(by_arch[arch]))), *(percent(by_arch[arch].get(t)) for t in tasks)]
        for arch in ranked
    ]
    return pages.table(["architecture", "MAD score", *tasks], lines)


def _bold(text: str) -> Markup:
    return Markup("<b>{}</b>").format(text)


def score_panels(results: Results, colours: dict[str, str]) -> list[Panel]:
    """The MAD score, then each task: a bar for each architecture, with its interval."""
    by_arch = scores(results)
    whole = {arch: mad_score(by_task) for arch, by_task in by_arch.items()}
    tasks = list(dict.fromkeys(run.task.name for run, _ in results))
    by_task = {task: {arch: found[task] for arch, found in by_arch.items() if task in found} for task in tasks}
    return [
        Panel(name, partial(_draw_bars, found=found, colours=colours), small=True)
        for name, found in {"MAD score": whole, **by_task}.items()
    ]


def _draw_bars(axes: Axes, found: dict[str, Score], colours: dict[str, str]) -> None:
    for place, (arch, colour) in enumerate(colours.items()):
        score = found.get(arch)
        if score and score.value is not None:
            error = None if score.margin is None else 100 * score.margin
            axes.bar(place, 100 * score.value, yerr=error, color=colour, ecolor=GREY, capsize=2)
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(colours) - 0.4)
    axes.set_ylim(0, 100)


def _difficulty(results: Results, colours: dict[str, str]) -> Section | None:
    """For each task a curve along each variable that its settings change."""
    best = best_runs(results)
    panels = []
    for name in dict.fromkeys(run.task.name for run, _ in results):
        settings = list(dict.fromkeys(run.task for run, _ in results if run.task.name == name))
        for variable in [k for k in settings[0].options() if len({getattr(s, k) for s in settings}) > 1]:
            along = sorted(_along(settings, variable), key=lambda s: getattr(s, variable))
            draw = partial(_draw_along, along=along, variable=variable, best=best, colours=colours)
            panels.append(Panel(f"{name}: {variable}", draw))
    if not panels:
        return None
    caption = "Test accuracy, percent, as one option of a task changes and the others stay."
    return Section("Accuracy as tasks get harder", [pages.figure(panels, caption, legend_of(colours))])


def _along(settings: Sequence[Task], variable: str) -> list[Task]:
    """The baseline, and the settings that differ from it in this variable only."""
    base = settings[0].options()
    return [s for s in settings if all(v == base[k] for k, v in s.options().items() if k != variable)]


def _draw_along(axes: Axes, along: Sequence[Task], variable: str, best: Any, colours: dict[str, str]) -> None:
    for arch, colour in colours.items():
        places, middles, errors = [], [], []
        for setting in along:
            values = [100 * b[1]["accuracy"] for (a, task, _), b in best.items() if b and a == arch and task == setting]
            if values:
                places.append(getattr(setting, variable))
                middles.append(mean(values))
                errors.append(margin(values) or 0.0)
        if places:
            axes.errorbar(places, middles, yerr=errors if any(errors) else None, marker="o", ms=4, color=colour)
    axes.set_xticks([getattr(setting, variable) for setting in along])
    axes.set_xlabel(variable)
    axes.set_ylim(0, 102)


def training_section(rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> Section | None:
    """The training curves of the best runs, at the first setting of each task."""
    curves = {row["run"]: row["curve"] for row in rows if row["curve"]}
    results = results_of(rows)
    best = best_runs(results)
    tasks = list({run.task.name: run.task for run, _ in reversed(results)}.values())[::-1]
    losses, accuracies = [], []
    for task in tasks:
        chosen = {a: b[0] for (a, t, _), b in reversed(best.items()) if b and t == task}
        found = [(colours[arch], curves[run]) for arch, run in chosen.items() if run in curves]
        if found:
            losses.append(Panel(task.name, partial(_draw_curves, found=found, measure="loss")))
            accuracies.append(Panel(task.name, partial(_draw_curves, found=found, measure="held_out_accuracy", scale=100)))
    if not losses:
        return None
    told = "The best run of each architecture at the first setting of each task."
    return Section(
        "Training",
        [
            pages.note(told),
            pages.figure(accuracies, "Held-out accuracy, percent, by epoch.", legend_of(colours)),
            pages.figure(losses, "Training loss, nats, by epoch.", legend_of(colours)),
        ],
    )


def _draw_curves(axes: Axes, found: Sequence[tuple[str, Any]], measure: str, scale: float = 1) -> None:
    for colour, points in found:
        values = [scale * point[measure] for point in points]
        axes.plot(range(1, len(values) + 1), values, color=colour, marker="o" if len(values) <= FEW else "", ms=4)
    longest = max(len(points) for _, points in found)
    axes.set_xlim(0, longest + 1)
    axes.xaxis.set_major_locator(MaxNLocator(min(longest + 1, 6), integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylim(0, 102 if scale > 1 else 1.1 * axes.get_ylim()[1])


def _cost_table(results: Results) -> Markup:
    lines = []
    by_arch = scores(results)
    for arch, cost in costs_of(results).items():
        figures = [f"{cost.parameters:,}", f"{cost.state:,}", f"{cost.flops:,.0f}"] if cost else ["-"] * 3
        seconds = [m["seconds"] for run, m in results if run.arch == arch and m]
        times = [f"{sum(seconds) / 60:,.1f}"] if seconds else ["-"]
        lines.append([label(arch), percent(mad_score(by_arch[arch])), *figures, *times])
    head = ["architecture", "MAD score", "parameters", "state", "FLOPs per token", "minutes"]
    told = (
        "Parameters of the layers. State: numbers kept of a sequence while decoding, and forward FLOPs per token, both for "
        f"length {results[0][0].task.length}. Minutes of training, all runs together."
    )
    return pages.table(head, lines) + pages.note(told)


def _diagrams(results: Results) -> list[Markup]:
    """The layers of each architecture, as of its first run."""
    found, first = [], dict[str, Run]()
    for run, _ in results:
        first.setdefault(run.arch, run)
    for arch, run in first.items():
        try:
            specs = resolve(arch, run.training.dim, seqlen=run.task.length).layers
            layers = [(str(spec), _colour_of(spec.layer)) for spec in specs]
        except ValueError:  # a layer from outside that is not here
            layers = [(name, COLOURS[0]) for name in arch.split(" ")]
        found.append(pages.chain(layers))
    told = "Orange: attention. Blue: other layers that mix tokens. Grey: layers that work on each token by itself."
    return [*found, pages.note(told)]


def _colour_of(layer: type[Layer]) -> str:
    """Mixers of channels grey, attention orange, other mixers of the sequence blue."""
    return GREY if layer.mixes == "channel" else COLOURS[1] if layer.is_attention else COLOURS[0]


def _published(results: Results) -> Section | None:
    """Scores beside the published ones of the same architectures, over the tasks that have both."""
    rows, by_arch = published.published(), scores(results)
    tasks = [
        task for task in dict.fromkeys(run.task.name for run, _ in results) if all(task in r.tasks for r in rows.values())
    ]
    ours, by_name = {}, set()
    for arch, by_task in sorted(by_arch.items(), key=lambda item: is_published(item[0])):  # of one family the named counts
        values = [score.value for task in tasks if (score := by_task.get(task)) and score.value is not None]
        if values and (name := published.family(arch)):
            ours[name] = mean(values)
            by_name |= {name} if is_published(arch) else set()
    if not ours:
        return None
    theirs = {name: mean([rows[name].tasks[task] for task in tasks]) for name in ours}
    lines = [
        [name, *(f"{100 * value:.1f}" for value in (ours[name], theirs[name], rows[name].mad)), rows[name].source]
        for name in ours
    ]
    head = [
        "architecture",
        f"here, {len(tasks)} task{'s' if len(tasks) > 1 else ''}",
        "published, these tasks",
        "published, all tasks",
        "source",
    ]
    told = [f"{name}: {text}" for name, text in published.sources().items() if name in {rows[n].source for n in ours}]
    if others := [name for name in ours if name not in by_name]:
        told.append(f"Layers of the published kinds, but sizes of one's own: {', '.join(others)}.")
    if agreed := published.agreement(ours, theirs):
        told.append(
            f"Rank agreement with the published scores on these tasks, {agreed.count} architectures: "
            f"Spearman {agreed.spearman:+.2f}, Kendall {agreed.kendall:+.2f}."
        )
    if linked := published.score_against_perplexity():
        told.append(
            f"Published scores against published perplexity, {linked.count} architectures of one family: "
            f"Pearson {linked.pearson:+.2f}, Spearman {linked.spearman:+.2f}."
        )
    return Section("Compared with published scores", [pages.table(head, lines), *map(pages.note, told)])
