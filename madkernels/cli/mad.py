"""`madkernels mad`: score architectures on the MAD tasks, and look at the tasks."""

from __future__ import annotations

from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from madkernels.cli import live
from madkernels.cli.device import compute_dtype
from madkernels.cli.live import Every, Watch
from madkernels.cli.options import Address, ComputeDtype, Device, DryRun, EngineName, Plugins, Results, Workers
from madkernels.cli.sweeps import (
    Bars,
    announce,
    done_in,
    engine_of,
    load_plugins,
    progress_bars,
    stoppable,
)

if TYPE_CHECKING:  # torch is loaded when a command runs, not to print its help
    from rich.console import Console
    from rich.text import Text

    from madkernels.runs.engines import Engine
    from madkernels.runs.execute import Outcome
    from madkernels.runs.store import Store
    from madkernels.synthetics.protocol import Run
    from madkernels.synthetics.tasks import Task

mad = typer.Typer(help="Score architectures on the MAD capability tasks.", no_args_is_help=True)

DEMO_ARCHS = ("mamba:dstate=4 swiglu mamba:dstate=4 swiglu", "mamba:dstate=4 swiglu attention:heads=4 swiglu")
COLOURS = ("cyan", "green", "bright_black", "magenta")

Folder = Annotated[Path, typer.Option(help="Folder of the results.")]
Measure = Annotated[
    Literal["accuracy", "macro_accuracy"],
    typer.Option(help="Accuracy over all scored tokens, or its mean over token classes."),
]


@mad.command()
def run(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help='Architecture, such as "mamba swiglu attention swiglu", or published:NAME (mad published lists them). '
            "Repeat for several."
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Names of tasks, comma-separated, or all.")] = "all",
    protocol: Annotated[
        str, typer.Option(help="demo (takes minutes), strict-small, strict, paper, or a .json file.")
    ] = "demo",
    out: Results = Path("out/mad"),
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed, in place of the protocol's seeds. Repeat for several.")
    ] = None,
    engine: EngineName = "pool",
    workers: Workers = None,
    address: Address = "auto",
    device: Device = "cpu",
    together: Annotated[
        bool | None,
        typer.Option(
            "--together/--apart",
            help="Train the runs of a setting as one stacked model, or one by one. Default: together on a GPU only.",
        ),
    ] = None,
    dtype: Annotated[
        ComputeDtype | None,
        typer.Option(help="Compute dtype; bfloat16 is autocast, auto the faster one here. Default: the protocol's."),
    ] = None,
    seeds_until_apart: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="After all runs, one more seed for each architecture whose interval overlaps with that of a neighbour in "
            "the ranking, until they are apart or have so many. Default: the protocol's.",
        ),
    ] = None,
    dry_run: DryRun = False,
    plugin: Plugins = None,
) -> None:
    """Train every architecture on every task, and print their scores.

    Without --arch the demo compares a pure recurrence with a hybrid that has one attention layer.
    """
    from rich.console import Console

    from madkernels.runs.execute import left
    from madkernels.runs.store import Store
    from madkernels.synthetics.protocol import Run, load_protocol, plan, results_of
    from madkernels.synthetics.report import table, write_csv
    from madkernels.synthetics.seeds import more_seeds
    from madkernels.synthetics.sweep import check, work_of

    plugins = load_plugins(plugin)
    chosen = load_protocol(protocol)
    if not arch and protocol != "demo":
        raise ValueError(f'the {protocol} protocol needs an architecture: --arch "mamba swiglu attention swiglu"')
    console = Console()
    place = engine_of(engine, workers, address, device, plugins)
    computed_in = None if dtype is None else compute_dtype(dtype, device)
    if dtype == "auto":
        print(f"dtype: {computed_in}", flush=True)
    runs = plan(chosen, arch or DEMO_ARCHS, tasks, seeds=seed, dtype=computed_in)
    seeds = len(seed or chosen.seeds)
    most = _most_seeds(chosen.seeds_until_apart if seeds_until_apart is None else seeds_until_apart, seeds)
    if chosen.agreement or not protocol.endswith(".json"):
        print(f"{protocol}: agreement with the published scores: {chosen.agreement or 'not measured'}", flush=True)
    if dry_run:
        announce(work_of(runs), done_in(out), place)
        if most > seeds:
            print(f"then, where intervals overlap, up to {len(runs) // seeds * (most - seeds)} runs of more seeds")
        return
    at_once = device != "cpu" if together is None else together
    with closing(Store(out)) as store:
        with stoppable(store, runs):
            check(left(runs, store))
            announce(work_of(runs), store.metrics(), place)
            outcome = _train(runs, store, place, console, at_once)
            while more := more_seeds(runs, store.metrics(), chosen.score, most):
                runs += more
                console.print(f"{len({r.arch for r in more})} architectures are not apart; one more seed: {len(more)} runs")
                outcome += _train(more, store, place, console, at_once)
        wanted = {run.key() for run in runs}
        rows = [row for row in store.latest(Run.of) if row["key"] in wanted]
        scores_path, runs_path = write_csv(rows, out)
        table(results_of(rows), chosen.score).show(console)
        console.print(f"{outcome.trained} runs trained, {outcome.already_done} found done, {outcome.failed} failed.")
        console.print(f"Results: {store.path}, {scores_path}, {runs_path}", soft_wrap=True)


def _most_seeds(most: int, seeds: int) -> int:
    """ValueError where there are more already."""
    if most and most < seeds:
        raise ValueError(f"seeds until apart are {most} at most, fewer than the {seeds} that all architectures have")
    return most


def _train(runs: list[Run], store: Store, place: Engine, console: Console, together: bool) -> Outcome:
    """A sweep with its bars."""
    from madkernels.synthetics.sweep import sweep, work_of

    done = store.metrics()
    with progress_bars(console) as bars:
        progress = Bars(bars, work_of(runs), {run for run in runs if run.key() in done})
        return sweep(runs, store, progress, engine=place, together=together)


@mad.command()
def status(out: Folder = Path("out/mad"), watch: Watch = False, every: Every = 2.0, plugin: Plugins = None) -> None:
    """Show how far a sweep is, as madkernels status does."""
    live.status(out, watch, every, plugin)


@mad.command()
def compare(out: Folder = Path("out/mad"), measure: Measure = "accuracy", plugin: Plugins = None) -> None:
    """Compare the architectures of a folder with the first of them: differences by task, with intervals over seeds."""
    from rich.console import Console

    from madkernels.runs.store import Results
    from madkernels.synthetics import report
    from madkernels.synthetics.protocol import Run, results_of

    load_plugins(plugin)
    results = Results(out)
    found = results_of(results.latest(Run.of))
    results.close()
    console = Console()
    report.table(found, measure).show(console)
    report.compare(found, measure).show(console)


@mad.command()
def report(
    out: Folder = Path("out/mad"),
    page: Annotated[
        Path | None, typer.Option(help="The HTML file to write. Default: report.html in the folder of the results.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "MAD scores",
    plugin: Plugins = None,
) -> None:
    """Write the results of a folder as one HTML page with its pictures inside."""
    from rich.console import Console

    from madkernels.runs.store import Results
    from madkernels.synthetics.page import write_page
    from madkernels.synthetics.protocol import Run

    load_plugins(plugin)
    results = Results(out)
    place = page or out / "report.html"
    write_page(results.latest(Run.of), place, title)
    results.close()
    Console().print(f"Report: {place}", soft_wrap=True)


@mad.command()
def normalise(
    arch: Annotated[
        list[str], typer.Option(help='Architecture, such as "2*(mamba swiglu)" or published:NAME. Repeat for several.')
    ],
    state: Annotated[
        int | None, typer.Option(min=1, help="Wanted fixed state of the whole model, in elements; the MAD paper uses 4096.")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Wanted parameters of the layers, met as nearly as hidden widths allow.")
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 128,
    seqlen: Annotated[
        int, typer.Option(min=1, help="Tokens per sequence, for the total state and the FLOPs per token.")
    ] = 128,
    plugin: Plugins = None,
) -> None:
    """Set the free sizes of architectures to one fixed state or number of parameters, and print what they take."""
    from rich.console import Console

    from madkernels.models import HybridLM, counting, normalise as sizes
    from madkernels.models.presets import resolve
    from madkernels.reporting.tables import Table

    load_plugins(plugin)
    told = f"At width {dim}; total state and forward FLOPs per token for a sequence of length {seqlen}."
    table = Table(caption=told, spare=("total state", "FLOPs per token"))
    for column in ("architecture", "parameters", "fixed state", "total state", "FLOPs per token"):
        table.add_column(column, justify="left" if column == "architecture" else "right")
    for text in arch:
        found = resolve(text, dim, seqlen=seqlen)
        found = found if state is None else sizes.with_state(found, state, dim)
        found = found if parameters is None else sizes.with_parameters(found, parameters, dim)
        model = HybridLM(found, vocab_size=16, dim=dim)
        counts = sizes.parameters(found, dim), sizes.fixed_state(found, dim), counting.state_size(model, seqlen)
        table.add_row(str(found), *(f"{c:,}" for c in counts), f"{counting.flops_per_token(model, seqlen):,.0f}")
    table.show(Console())


@mad.command()
def search(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="Architecture that competes beside the patterns, such as published:NAME. Repeat for several."),
    ] = None,
    mixers: Annotated[str, typer.Option(help="Sequence mixers to choose from, comma-separated.")] = "hyena,mamba,attention",
    channels: Annotated[str, typer.Option(help="Channel mixers to choose from, comma-separated.")] = "swiglu,moe",
    blocks: Annotated[int, typer.Option(min=1, help="Depth, in pairs of a sequence mixer and a channel mixer.")] = 2,
    candidates: Annotated[
        int, typer.Option(min=1, help="Most candidates to score; drawn at random where there are more.")
    ] = 27,
    max_state: Annotated[
        float, typer.Option(help="Most elements of total state (the KV cache of attention included).")
    ] = float("inf"),
    max_parameters: Annotated[float, typer.Option(help="Most parameters of the layers.")] = float("inf"),
    max_flops: Annotated[float, typer.Option(help="Most forward FLOPs per token.")] = float("inf"),
    protocol: Annotated[str, typer.Option(help="demo, strict-small, strict, paper, or a .json file.")] = "demo",
    out: Folder = Path("out/search"),
    seed: Annotated[int, typer.Option(help="Seed of the draw of candidates.")] = 0,
    workers: Workers = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
    plugin: Plugins = None,
) -> None:
    """Propose hybrids under a budget, by successive halving, and mark those that no other beats."""
    from rich.console import Console

    from madkernels.models.presets import canonical
    from madkernels.reporting.tables import Table
    from madkernels.runs.store import Store
    from madkernels.synthetics import search as searching
    from madkernels.synthetics.protocol import load_protocol
    from madkernels.synthetics.sweep import work_of

    plugins, chosen = load_plugins(plugin), load_protocol(protocol)
    found = searching.candidates(mixers.split(","), channels.split(","), blocks)
    budget = searching.Budget(max_state, max_parameters, max_flops)
    costs = searching.affordable(found, chosen, budget, candidates, seed)
    if arch:
        costs |= searching.affordable(list(map(canonical, arch)), chosen, budget, len(arch), seed)
    console = Console()
    console.print(f"{len(costs)} of {len({*found, *map(canonical, arch or ())})} candidates")
    place = engine_of("pool", workers, "auto", device, plugins)
    work = work_of(searching.foreseen(costs, chosen))
    if dry_run:
        announce(work, done_in(out), place)
        return
    with closing(Store(out)) as store, stoppable(store):
        announce(work, store.metrics(), place)

        def progress_of(rung: int, runs: list[Run]) -> Bars:
            done = store.metrics()
            return Bars(bars, work_of(runs), {run for run in runs if run.key() in done}, f"rung {rung}")

        with progress_bars(console) as bars:
            ranked = searching.search(costs, chosen, store, place, progress_of, together=device != "cpu")
    front = searching.pareto(ranked)
    told = "* on the Pareto front of score, state, parameters and FLOPs, of those that came furthest."
    table = Table(caption=told, spare=("rung", "parameters", "FLOPs per token"))
    for column in ("architecture", "", "MAD score", "rung", "parameters", "state", "FLOPs per token"):
        table.add_column(column, justify="left" if column in ("", "architecture") else "right")
    for f in ranked:
        score = f"{100 * f.score:.1f}" + ("" if f.margin is None else f" ± {100 * f.margin:.1f}")
        counts = f"{f.cost.parameters:,}", f"{f.cost.state:,}", f"{f.cost.flops:,.0f}"
        table.add_row(f.arch, "*" if f.arch in front else "", score, str(f.rung), *counts)
    table.show(console)


@mad.command("published")
def show_published(
    dim: Annotated[int, typer.Option(min=1, help="Width that the architectures are scaled to; the paper's is 128.")] = 128,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens per sequence, over which filters reach.")] = 128,
) -> None:
    """List the architectures with published MAD scores: what published:NAME stands for at a width, and how it scored."""
    from rich.console import Console

    from madkernels.models import normalise as sizes
    from madkernels.models.presets import PREFIX, resolve
    from madkernels.reporting.tables import Table
    from madkernels.synthetics import published
    from madkernels.synthetics.report import label

    told = f"At width {dim} and length {seqlen}. Parameters of the layers; fixed state in elements; scores in percent."
    table = Table(caption=told, spare=("source", "perplexity"))
    for column in ("name", "architecture", "parameters", "state", "MAD score", "perplexity", "source"):
        table.add_column(column, justify="left" if column in ("name", "architecture", "source") else "right")
    console = Console()
    for row in published.published().values():
        arch = resolve(PREFIX + row.arch, dim, seqlen=seqlen)
        counts = f"{sizes.parameters(arch, dim):,}", f"{sizes.fixed_state(arch, dim):,}"
        perplexity = "-" if row.perplexity is None else f"{row.perplexity:.2f}"
        table.add_row(PREFIX + row.arch, label(str(arch)), *counts, f"{100 * row.mad:.1f}", perplexity, row.source)
    table.show(console)
    for row in published.published().values():
        if row.note:
            console.print(f"{row.name}: {row.note}", soft_wrap=True)
    for name, text in published.sources().items():
        console.print(f"{name}: {text}", soft_wrap=True)


@mad.command("tasks")
def show_tasks(
    name: Annotated[str | None, typer.Argument(help="Name of one task. Default: all.")] = None,
    protocol: Annotated[str, typer.Option(help="Protocol whose baseline settings are shown.")] = "demo",
    count: Annotated[int, typer.Option(min=1, help="Sequences to show of each task.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the sequences.")] = 12345,
    plugin: Plugins = None,
) -> None:
    """Show what the tasks look like: a few test sequences, tokens coloured by role, what is to be answered below them."""
    from rich.console import Console

    from madkernels.synthetics.protocol import load_protocol, task_names

    load_plugins(plugin)
    chosen = load_protocol(protocol)
    console = Console(soft_wrap=True)
    for task_name in task_names(name or "all"):
        if task_name in chosen.settings:
            _show(console, chosen.settings[task_name][0], count, seed)


def _show(console: Console, task: Task, count: int, seed: int) -> None:
    from rich.text import Text

    console.print(Text(task.name, style="bold") + Text(f": {task.summary}"))
    roles = zip(cycle(COLOURS), task.roles().items())
    legend = [Text(f"{role} {_span(ids)}", style=colour) for colour, (role, ids) in roles if ids]
    console.print(Text("  ") + Text(", ").join(legend))
    for inputs, targets in zip(*task.generate(count, seed=seed, split="test"), strict=True):
        for line in _rows(task, inputs.tolist(), targets.tolist(), console.width):
            console.print(line)
        console.print()


def _span(ids: range) -> str:
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]}-{ids[-1]}"


def _rows(task: Task, inputs: list[int], targets: list[int], width: int) -> list[Text]:
    """Tokens and, under them, the answers; broken into lines of the console's width."""
    from rich.text import Text

    from madkernels.synthetics.tasks import IGNORE

    cell = len(str(task.vocab_size - 1)) + 1
    per_line = max((width - 10) // cell, 1)
    lines = []
    for begin in range(0, len(inputs), per_line):
        part = slice(begin, begin + per_line)
        shown = Text("  input  ")
        for token in inputs[part]:
            shown.append(f"{token:>{cell}}", style=_colour(task, token))
        answers = Text("  answer ")
        for token in targets[part]:
            answers.append(" " * cell if token == IGNORE else f"{token:>{cell}}", style="bold yellow")
        lines += [shown, answers] if answers.plain.strip() != "answer" else [shown]
    return lines


def _colour(task: Task, token: int) -> str:
    return next((colour for colour, ids in zip(cycle(COLOURS), task.roles().values()) if token in ids), "default")
