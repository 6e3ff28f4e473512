"""`madkernels scale`: scaling laws, from the plan of the runs to the fits and their report."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madkernels.cli.fits import compare, correlate, fit, line, report
from madkernels.cli.options import Address, Device, DryRun, EngineName, Force, Plugins, Results, Workers
from madkernels.cli.sweeps import (
    Bars,
    announce,
    done_in,
    engine_of,
    load_plugins,
    progress_bars,
    stoppable,
)
from madkernels.files import refuse_existing

if TYPE_CHECKING:  # torch is loaded when a command runs, not to print its help
    from madkernels.scaling.plan import Planned, Setting

scale = typer.Typer(help="Plan, run, fit and compare scaling laws.", no_args_is_help=True)

FEW_STEPS = 20

# ---- plans


planning = typer.Typer(
    help="Make tables of runs: CSV files to be read, edited, and trained by scale run.", no_args_is_help=True
)
scale.add_typer(planning, name="plan")

Archs = Annotated[
    list[str],
    typer.Option(
        "--arch",
        help="A family such as striped-hyena, published:NAME (mad published lists them), or LABEL=TEMPLATE, as in "
        "'mine=hyena swiglu attention:heads={dim/32} swiglu'; repeat for several.",
    ),
]
Out = Annotated[Path, typer.Option(help="The plan: a CSV file that is not there yet.")]
Blocks = Annotated[int, typer.Option(min=1, help="Depth, in pairs of a sequence mixer and a channel mixer.")]
Data = Annotated[Path, typer.Option(help="Folder that madkernels train prepare wrote.")]
Seqlen = Annotated[int, typer.Option(min=1, help="Tokens per row (sequence length).")]
Batch = Annotated[
    int, typer.Option(min=1, help="Rows per step at the smallest budget; grows with the square root of the budget.")
]
Lr = Annotated[float, typer.Option(help="Peak learning rate at width 64; falls with the square root of the width.")]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", help="Seed; each run is trained once with each. Repeat for several.")
]


@planning.command()
def isoflop(
    arch: Archs,
    budget: Annotated[list[float], typer.Option(help="Budget in training FLOPs. Repeat for several.")],
    dims: Annotated[str, typer.Option(help="Widths to choose from, comma-separated.")],
    data: Data,
    out: Out,
    sizes: Annotated[int, typer.Option(min=3, help="Model sizes at each budget.")] = 5,
    ratio: Annotated[float, typer.Option(help="Tokens per parameter of the size in the middle.")] = 20.0,
    blocks: Blocks = 2,
    seqlen: Seqlen = 256,
    batch: Batch = 4,
    lr: Lr = 6e-3,
    seed: Seeds = None,
    force: Force = False,
    plugin: Plugins = None,
) -> None:
    """Plan several sizes at each of several budgets: where the compute-optimal size lies."""
    from madkernels.scaling.plan import isoflop as plan

    refuse_existing(out, force)
    load_plugins(plugin)
    setting = _setting(data, seqlen, batch, lr, seed)
    _write(plan(_labelled(arch), budget, _numbers(dims), setting, blocks=blocks, sizes=sizes, ratio=ratio), out)


@planning.command()
def overtrained(
    arch: Archs,
    dim: Annotated[int, typer.Option(min=1, help="Width of the models.")],
    ratio: Annotated[list[float], typer.Option(help="Tokens per parameter. Repeat for several.")],
    data: Data,
    out: Out,
    blocks: Blocks = 2,
    seqlen: Seqlen = 256,
    batch: Batch = 4,
    lr: Lr = 6e-3,
    seed: Seeds = None,
    force: Force = False,
    plugin: Plugins = None,
) -> None:
    """Plan one size with more and more tokens: what training beyond the compute-optimal point brings."""
    from madkernels.scaling.plan import overtrained as plan

    refuse_existing(out, force)
    load_plugins(plugin)
    _write(plan(_labelled(arch), dim, ratio, _setting(data, seqlen, batch, lr, seed), blocks=blocks), out)


@planning.command()
def state(
    arch: Archs,
    dim: Annotated[int, typer.Option(min=1, help="Width of the models.")],
    budget: Annotated[float, typer.Option(help="Budget in training FLOPs.")],
    size: Annotated[list[int], typer.Option(help="Fixed state of the whole model, in elements. Repeat for several.")],
    data: Data,
    out: Out,
    blocks: Blocks = 2,
    seqlen: Seqlen = 256,
    batch: Batch = 4,
    lr: Lr = 6e-3,
    seed: Seeds = None,
    force: Force = False,
    plugin: Plugins = None,
) -> None:
    """Plan one width and budget with more and more fixed state: what a larger state brings."""
    from madkernels.scaling.plan import states as plan

    refuse_existing(out, force)
    load_plugins(plugin)
    _write(plan(_labelled(arch), dim, budget, size, _setting(data, seqlen, batch, lr, seed), blocks=blocks), out)


def _labelled(archs: list[str]) -> dict[str, str]:
    found = {}
    for text in archs:
        label, equals, template = text.partition("=")
        family = not equals or any(c in label for c in " :")  # an option's equals sign is no label's
        found[text if family else label] = text if family else template
    return found


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r}: expected whole numbers, comma-separated") from None


def _setting(data: Path, seqlen: int, batch: int, lr: float, seeds: list[int] | None) -> Setting:
    from madkernels.scaling.plan import Setting
    from madkernels.scaling.training.data import Corpus

    return Setting(Corpus(data).vocab_size, seqlen, batch, lr, seeds=tuple(seeds or Setting.seeds))


def _write(rows: list[Planned], out: Path) -> None:
    from rich.console import Console

    from madkernels.reporting.tables import Table
    from madkernels.runs.pace import amount
    from madkernels.scaling.plan import write_plan

    write_plan(rows, out)
    told = amount({row.run("", ""): row.flops for row in rows}, os.cpu_count() or 1)
    table = Table(caption=f"{len(rows)} runs: {told}", spare=("kind", "tokens per parameter", "width", "tokens"))
    names = ("architecture", "kind", "width", "budget", "parameters", "tokens", "tokens per parameter", "steps")
    for name in names:
        table.add_column(name, justify="left" if name in names[:2] else "right")
    for row in rows:
        counted = f"{row.params:,}", f"{row.tokens:,}", f"{row.tokens_per_param:.1f}", f"{row.steps:,}"
        table.add_row(row.architecture, row.kind, str(row.dim), f"{row.budget:.3g}", *counted)
    console = Console()
    table.show(console)
    if short := sum(row.steps < FEW_STEPS for row in rows):
        few = f"{short} of {len(rows)} runs have fewer than {FEW_STEPS} steps, too few to tell anything"
        typer.echo(f"warning: {few}; give larger budgets, smaller widths or a smaller batch", err=True)
    console.print(f"Plan: {out}", soft_wrap=True)


# ---- runs


@scale.command()
def run(
    plan: Annotated[list[Path], typer.Argument(help="CSV files that scale plan wrote.")],
    data: Data,
    out: Results,
    engine: EngineName = "pool",
    workers: Workers = None,
    address: Address = "auto",
    device: Device = "cpu",
    dry_run: DryRun = False,
    plugin: Plugins = None,
) -> None:
    """Train the runs of plans. A sweep that was killed goes on where it was when the command is given again."""
    from rich.console import Console

    from madkernels.runs.store import FILE, Store
    from madkernels.scaling.plan import read_plan
    from madkernels.scaling.sweep import CSV, runs_of, sweep, write_csv

    if (out / CSV).is_file() and not (out / FILE).is_file():
        raise ValueError(f"{out / CSV} is there, but not the {FILE} of its runs; choose another folder")
    plugins = load_plugins(plugin)
    rows = list(dict.fromkeys(row for path in plan for row in read_plan(path)))  # plans may share runs
    runs = runs_of(rows, data, out)
    work = {run: row.flops for run, row in zip(runs, rows, strict=True)}
    place = engine_of(engine, workers, address, device, plugins)
    if dry_run:
        announce(work, done_in(out), place)
        return
    console = Console()
    with closing(Store(out)) as store:
        with stoppable(store, runs):
            known = store.metrics()
            announce(work, known, place)
            with progress_bars(console) as bars:
                progress = Bars(bars, work, {run for run in runs if run.key() in known})
                outcome = sweep(runs, work, store, progress, place)
        write_csv(rows, runs, store, out / CSV)
    console.print(f"{outcome.trained} runs trained, {outcome.already_done} found done, {outcome.failed} failed.")
    console.print(f"Results: {store.path}, {out / CSV}", soft_wrap=True)


# ---- fits


scale.command()(fit)
scale.command()(line)
scale.command()(compare)
scale.command()(correlate)
scale.command()(report)
