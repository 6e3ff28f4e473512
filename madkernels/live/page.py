"""A folder of runs as a page: how far it is, and what has come out so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle

from markupsafe import Markup
from matplotlib.axes import Axes

from madkernels.live.watched import MAD, SCALING, Cell, Seen, place_of
from madkernels.reporting import pages
from madkernels.reporting.figures import COLOURS, Panel
from madkernels.reporting.pages import Section
from madkernels.runs.pace import duration
from madkernels.scaling.training.log import Point
from madkernels.synthetics.page import colours_of, scores_section, training_section
from madkernels.synthetics.protocol import results_of

MOST_POINTS = 400  # of a curve that is drawn
FIGURES = {  # of the log of a training
    "loss": "Loss, nats per token",
    "held_out_loss": "Held-out loss, nats per token",
    "norm": "Norm of the gradient",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens per second",
}


def sections_of(seen: Seen) -> list[Section | None]:
    """What is to be shown of a folder, most wanted first."""
    if seen.kind == MAD:
        return [_status(seen, "task"), *_scores(seen)]
    if seen.kind == SCALING:
        colours = dict(zip(dict.fromkeys(arch for arch, _ in seen.cells), cycle(COLOURS), strict=False))
        return [_status(seen, "budget"), _losses(seen, colours), _curves(seen, colours)]
    return [_training(seen)]


def _status(seen: Seen, column: str) -> Section:
    columns = list(dict.fromkeys(name for _, name in seen.cells))
    lines = [
        [arch, *(_cell(seen.cells.get((arch, name))) for name in columns)]
        for arch in dict.fromkeys(arch for arch, _ in seen.cells)
    ]
    told = pages.note(f"Runs that are done, of all, by architecture and {column}.")
    return Section(
        "Status", [pages.table(["architecture", *columns], lines, cards=True), told, *map(pages.note, seen.running)]
    )


def _cell(cell: Cell | None) -> Markup:
    return Markup("<br>").join(cell.lines()) if cell else Markup("-")


# ---- MAD


def _scores(seen: Seen) -> list[Section | None]:
    results = results_of(seen.rows)
    if not any(measured for _, measured in results):
        return []
    colours = colours_of(results)
    return [scores_section(results, colours), training_section(seen.rows, colours)]


# ---- scaling


def _losses(seen: Seen, colours: Mapping[str, str]) -> Section | None:
    """The held-out losses of runs that are done."""
    done = [(*place_of(row["run"]), row["run"], row["metrics"]) for row in seen.rows if row["metrics"]]
    if not done:
        return None
    lines = []
    for arch, name, run, m in done:
        figures = f"{m['loss']:.4f}", f"{m['params']:,}", f"{m['tokens']:,}", str(run.dim), duration(m["seconds"])
        lines.append([pages.swatch(arch, colours[arch]), name, *figures])
    by_name: dict[str, list[tuple[str, float, float]]] = {}
    for arch, name, _, m in done:
        by_name.setdefault(name, []).append((colours[arch], m["params"], m["loss"]))
    panels = [Panel(name, partial(_draw_losses, found=found)) for name, found in by_name.items()]
    head = ["architecture", "budget", "held-out loss", "parameters", "tokens", "width", "time"]
    told = pages.note("Held-out losses in nats per token; parameters without embeddings.")
    drawn = pages.figure(panels, "Held-out loss, nats per token, over parameters.", colours)
    return Section("Losses so far", [drawn, pages.table(head, lines), told])


def _draw_losses(axes: Axes, found: Sequence[tuple[str, float, float]]) -> None:
    for colour in dict.fromkeys(colour for colour, _, _ in found):
        points = sorted((params, loss) for its, params, loss in found if its == colour)
        axes.semilogx(*zip(*points, strict=True), "o-", ms=4, color=colour)
    axes.set_xlabel("parameters")


def _curves(seen: Seen, colours: Mapping[str, str]) -> Section | None:
    """Of runs that are done and of those under way."""
    by_name: dict[str, list[tuple[str, Sequence[float], Sequence[float]]]] = {}
    for run, points in seen.curves.items():
        arch, name = place_of(run)
        tokens = [point["step"] * run.recipe.batch * run.recipe.seqlen for point in points]
        if points:
            by_name.setdefault(name, []).append((colours[arch], tokens, [point["loss"] for point in points]))
    if not by_name:
        return None
    panels = [Panel(name, partial(_draw_lines, lines=lines, label="tokens", scale="log")) for name, lines in by_name.items()]
    caption = "Training loss, nats per token, over tokens, of runs that are done and those under way. A dot is where one is."
    return Section("Training", [pages.figure(panels, caption, colours)])


def _draw_lines(
    axes: Axes, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], label: str, scale: str = "linear"
) -> None:
    axes.set_xscale(scale)
    for colour, across, up in lines:
        every = -(-len(up) // MOST_POINTS)
        axes.plot(across[::every], up[::every], color=colour, lw=1)
        axes.plot(across[-1], up[-1], "o", ms=3, color=colour)
    axes.set_xlabel(label)


# ---- one training


def _training(seen: Seen) -> Section | None:
    (arch, points), *_ = seen.curves.items()
    panels = [
        Panel(title, partial(_draw_lines, lines=[(COLOURS[0], *_over_steps(points, name))], label="step"))
        for name, title in FIGURES.items()
        if any(name in point for point in points)
    ]
    return Section("Training", [pages.figure(panels, arch)]) if panels else None


def _over_steps(points: Sequence[Point], name: str) -> tuple[list[float], list[float]]:
    known = [point for point in points if name in point]
    return [point["step"] for point in known], [point[name] for point in known]
