"""`madkernels scale fit`, `compare`, `correlate` and `report`: laws from the results of runs, in any CSV file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from madkernels.cli.options import (
    Budget,
    By,
    DropHighest,
    File,
    Files,
    Flops,
    Force,
    Groups,
    Json,
    Loss,
    MaxLoss,
    Params,
    Plugins,
    Resamples,
    Seed,
    Shape,
    ShapeName,
    Tokens,
    Where,
)
from madkernels.cli.sweeps import load_plugins

if TYPE_CHECKING:  # numpy and scipy are loaded when a command runs, not to print its help
    from rich.console import Console

    from madkernels.scaling.fits.compare import BootstrapOptions, Frontier
    from madkernels.scaling.fits.runs_table import Columns, Dropped, Table

TOLD = 20  # lines of warnings


def fit(
    file: File,
    params: Params = "params",
    loss: Loss = "loss",
    tokens: Tokens = None,
    flops: Flops = None,
    group: Groups = None,
    where: Where = None,
    drop_highest: DropHighest = 0,
    max_loss: MaxLoss = None,
    approach: Annotated[
        int,
        typer.Option(
            min=1, max=3, help="Approach: 1 (envelope of training curves), 2 (one curve per budget) or 3 (surface)."
        ),
    ] = 3,
    budget: Annotated[
        str | None, typer.Option(help="Approach 2: column of budgets, or budgets in FLOPs, comma-separated.")
    ] = None,
    shape: Annotated[ShapeName, typer.Option(help="Approach 2: shape of the curves over sizes.")] = "parabola",
    delta: Annotated[
        float, typer.Option(help="Approach 3: residual of ln L at which Huber's loss turns from squares to absolute values.")
    ] = 1e-3,
    lad: Annotated[
        bool, typer.Option("--lad", help="Approach 3: least absolute deviations, the limit of --delta towards 0.")
    ] = False,
    squares: Annotated[
        bool, typer.Option("--squares", help="Approach 3: least squares of the loss itself, not of its logarithm.")
    ] = False,
    tied: Annotated[bool, typer.Option("--tied", help="Approach 3: fit with alpha = beta.")] = False,
    bootstrap: Resamples = 1000,
    seed: Seed = 42,
    at: Annotated[
        list[float] | None,
        typer.Option(help="Approach 3: budget in FLOPs to print the optimal size for. Repeat for several."),
    ] = None,
    predict: Annotated[
        list[Path] | None,
        typer.Option(help="Approach 3: CSV of held-out runs, whose losses the fit is to predict. Repeat for several."),
    ] = None,
    to_json: Json = None,
    force: Force = False,
) -> None:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta, or find the best sizes, and show how sure that is.

    Without --tokens and --flops, the columns tokens, flops and budget that scale run writes are used. With --group, a group
    that cannot be fitted is reported, and the others are fitted.
    """
    from madkernels.scaling.fits.newton import SQUARES
    from madkernels.scaling.fits.outlying import outlying, spikes, tell
    from madkernels.scaling.fits.predict import predicted, prediction_json, prediction_table
    from madkernels.scaling.fits.runs_table import Columns, Cut, by_group, of_kind, read_table, select
    from madkernels.scaling.fits.surface import LAD
    from madkernels.scaling.fits.tables import as_json, best_as_json, best_sizes, best_table, summarise, tables

    if lad and squares:
        raise ValueError("--lad and --squares are two objectives: give one")
    if predict and approach != 3:
        raise ValueError(f"--predict takes the surface of approach 3; this is approach {approach}")
    if approach == 3 and tokens and flops:
        raise ValueError("approach 3 takes the data of a run from --tokens or from --flops: both are given")
    if wrong := [flops for flops in at or [] if not (math.isfinite(flops) and flops > 0)]:
        raise ValueError(f"--at: {wrong[0]}; expected a positive number of FLOPs")
    _may_write(to_json, force)
    cut = Cut(drop_highest, math.inf if max_loss is None else max_loss)
    table = _table(file, where)
    if tokens is None and flops is None:
        there = [name if name in table.columns else None for name in ("tokens", "flops", "budget")]
        tokens, flops = there[0], there[1] if approach < 3 or there[0] is None else None
        budget = budget or there[2]
        if tokens is None and flops is None:
            known = ", ".join(table.columns)
            raise ValueError(f"the data of a run comes from --tokens or from --flops: none is given; columns: {known}")
    columns = Columns(params, loss, tokens, flops)
    held_out = read_table(*predict) if predict else None
    for each in filter(None, (table, held_out)):
        for name in filter(None, (params, loss, tokens, flops, *(group or ()))):
            each.column(name)
    wanted = dict(by_group(held_out, *(group or ()))) if held_out else {}
    # Runs with more or less state are of other architectures; one size at several budgets is no curve over sizes.
    rows = of_kind(table, "isoflop", *(["overtrained"] if approach == 3 else []))
    _tell_kinds(len(table) - len(rows))
    console = _console(to_json)

    def fitted(name: str, part: Table) -> dict[str, Any]:
        selection = select(part, columns, cut)
        selection = tell(selection, spikes(selection.points) if approach == 1 else outlying(selection.points))
        _tell(selection.dropped, selection.warnings, name)
        if approach == 3:
            told = summarise(selection, LAD if lad else SQUARES if squares else delta, tied, bootstrap, seed)
            found, shown = as_json(told, at or []), tables(told, name, at or [])
            if name in wanted:
                test = select(wanted[name], columns)
                _tell(test.dropped, test.warnings, name)
                guess = predicted(told.fit, test)
                found["predicted"] = prediction_json(guess)
                shown.append(prediction_table(guess, name))
        else:
            best = best_sizes(selection, approach, budget, shape, bootstrap, seed)
            _tell([], best.warnings, name)
            found = best_as_json(best, selection, approach, shape)
            shown = [best_table(best, approach, name)]
        for each in shown:
            each.show(console)
        return found

    for name in wanted.keys() - dict(by_group(rows, *(group or ()))).keys():
        typer.echo(f"warning: {name}: held-out runs of no fit", err=True)
    if not group:
        _write(fitted("", rows), to_json)
        return
    found: dict[str, Any] = {}
    for name, part in by_group(rows, *group):
        try:
            found[name] = fitted(name, part)
        except ValueError as error:
            found[name] = {"error": str(error)}
            typer.echo(f"warning: {name}: not fitted: {error}", err=True)
    if all("error" in part for part in found.values()):
        raise ValueError("; ".join(f"{name}: {part['error']}" for name, part in found.items()) or f"{file}: no rows")
    _write({"groups": found}, to_json)


def line(
    file: Annotated[Path, typer.Argument(help="A CSV file with the best size of one budget per row, such as a paper's.")],
    params: Params = "params",
    tokens: Tokens = None,
    flops: Flops = None,
    group: Groups = None,
    where: Where = None,
    to_json: Json = None,
    force: Force = False,
) -> None:
    """Fit the lines N_opt ~ C^a and D_opt ~ C^b through best sizes that are known already.

    Without --tokens and --flops, the columns of these names are used; one of them is enough, by C = 6 N D.
    """
    from madkernels.scaling.fits.isoflop import given
    from madkernels.scaling.fits.runs_table import by_group, work
    from madkernels.scaling.fits.tables import best_table, laws_as_json

    _may_write(to_json, force)
    table = _table(file, where)
    if tokens is None and flops is None:
        tokens, flops = (name if name in table.columns else None for name in ("tokens", "flops"))
        if tokens is None and flops is None:
            raise ValueError(f"give --flops or --tokens; columns: {', '.join(table.columns)}")
    console, found = _console(to_json), dict[str, Any]()
    for name, part in by_group(table, *(group or ())):
        best = given(*work(part, params, tokens, flops))
        best_table(best, None, name).show(console)
        found[name] = laws_as_json(best)
    _write({"groups": found} if group else found[""], to_json)


def compare(
    files: Files,
    group: By = "architecture",
    params: Params = "params",
    tokens: Tokens = "tokens",
    flops: Flops = "flops",
    loss: Loss = "loss",
    budget: Budget = "budget",
    shape: Shape = "parabola",
    drop_highest: DropHighest = 0,
    max_loss: MaxLoss = None,
    bootstrap: Resamples = 1000,
    seed: Seed = 42,
    to_json: Json = None,
    force: Force = False,
) -> None:
    """Compare architectures with the first: exponent of the best size, least loss at each budget, where they cross."""
    from madkernels.scaling.fits.compare import BootstrapOptions, compare as differences, difference_table, frontier_table
    from madkernels.scaling.fits.runs_table import read_table

    _may_write(to_json, force)
    table, how = read_table(*files), BootstrapOptions(shape, bootstrap, seed)
    by_name, dropped = _frontiers(table, params, loss, tokens, flops, group, budget, how, drop_highest, max_loss)
    found = differences(by_name)
    console = _console(to_json)
    frontier_table(by_name).show(console)
    difference_table(found).show(console)
    rows = {
        name: {"a": f.a, "best": [asdict(b) for b in f.best], "left_out": f.left_out, "warnings": f.warnings}
        for name, f in by_name.items()
    }
    told = {"differences": [asdict(difference) for difference in found], "dropped": [asdict(row) for row in dropped]}
    _write({"architectures": rows, **told}, to_json)


def correlate(
    scores: Annotated[Path, typer.Argument(help="The results.csv that madkernels mad run wrote.")],
    runs: Files,
    at: Annotated[
        float | None, typer.Option(help="Budget in FLOPs. Default: the largest that all architectures have.")
    ] = None,
    group: By = "architecture",
    params: Params = "params",
    tokens: Tokens = "tokens",
    flops: Flops = "flops",
    loss: Loss = "loss",
    budget: Budget = "budget",
    shape: Shape = "parabola",
    drop_highest: DropHighest = 0,
    max_loss: MaxLoss = None,
    seed: Seed = 42,
    to_json: Json = None,
    force: Force = False,
) -> None:
    """Relate MAD scores to the least loss at a budget, for each task and their mean."""
    from madkernels.scaling.fits.compare import BootstrapOptions
    from madkernels.scaling.fits.correlate import correlate as relate, correlation_table, labels_of, losses_at, read_scores
    from madkernels.scaling.fits.runs_table import read_table

    _may_write(to_json, force)
    table, how = read_table(*runs), BootstrapOptions(shape, 0, seed)
    by_name, _ = _frontiers(table, params, loss, tokens, flops, group, budget, how, drop_highest, max_loss)
    chosen, losses = losses_at(by_name, at)
    labels = {name: arch for name, arch in labels_of(table, group).items() if name in by_name}
    rows = relate(read_scores(read_table(scores), labels), losses, seed)
    correlation_table(rows, chosen).show(_console(to_json))
    _write({"budget": chosen, "losses": losses, "tasks": [asdict(row) for row in rows]}, to_json)


def report(
    files: Files,
    out: Annotated[Path, typer.Option(help="The HTML file to write; it may replace an earlier report.")] = Path(
        "scaling.html"
    ),
    scores: Annotated[Path | None, typer.Option(help="MAD scores: the results.csv that madkernels mad run wrote.")] = None,
    group: By = "architecture",
    params: Params = "params",
    tokens: Tokens = "tokens",
    flops: Flops = "flops",
    loss: Loss = "loss",
    budget: Budget = "budget",
    shape: Shape = "parabola",
    drop_highest: DropHighest = 0,
    max_loss: MaxLoss = None,
    bootstrap: Resamples = 1000,
    seed: Seed = 42,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Scaling laws",
    force: Force = False,
    plugin: Plugins = None,
) -> None:
    """Write the runs, their laws and what is missing as one HTML page with its pictures inside."""
    from rich.console import Console

    from madkernels.files import refuse_existing, write_whole
    from madkernels.reporting.pages import is_page
    from madkernels.scaling.fits.compare import BootstrapOptions
    from madkernels.scaling.fits.report import page
    from madkernels.scaling.fits.runs_table import Cut, read_table

    refuse_existing(out, force or is_page(out))
    load_plugins(plugin)
    table, how = read_table(*files), BootstrapOptions(shape, bootstrap, seed)
    cut = Cut(drop_highest, math.inf if max_loss is None else max_loss)
    columns = _columns(table, params, loss, tokens, flops)
    write_whole(out, page(table, read_table(scores) if scores else None, columns, group, budget, how, title, cut))
    Console().print(f"Report: {out}", soft_wrap=True)


def _table(file: Path, where: str | None) -> Table:
    """The rows of a file, or those that meet a condition."""
    from madkernels.scaling.fits.condition import rows_where
    from madkernels.scaling.fits.runs_table import read_table

    table = read_table(file)
    return table if where is None else rows_where(table, where)


def _columns(table: Table, params: str, loss: str, tokens: str | None, flops: str | None) -> Columns:
    """The columns to read; tokens or FLOPs may be missing under their usual names, since C = 6 N D."""
    from madkernels.scaling.fits.runs_table import Columns

    if flops == "flops" and flops not in table.columns and tokens in table.columns:
        flops = None
    if tokens == "tokens" and tokens not in table.columns and flops in table.columns:
        tokens = None
    return Columns(params, loss, tokens, flops)


def _frontiers(
    table: Table,
    params: str,
    loss: str,
    tokens: str | None,
    flops: str | None,
    group: str,
    budget: str,
    how: BootstrapOptions,
    drop_highest: int,
    max_loss: float | None,
) -> tuple[dict[str, Frontier], list[Dropped]]:
    """The frontiers of all architectures and the rows dropped, after warnings about all that is odd."""
    from madkernels.scaling.fits.compare import frontiers
    from madkernels.scaling.fits.runs_table import Cut, kinds_of

    cut = Cut(drop_highest, math.inf if max_loss is None else max_loss)
    by_name, dropped = frontiers(table, _columns(table, params, loss, tokens, flops), group, budget, how, cut)
    _tell_kinds(sum(kind != "isoflop" for kind in kinds_of(table)))
    _tell(dropped, [f"{name}: {why}" for name, found in by_name.items() for why in found.left_out + found.warnings])
    return by_name, dropped


def _console(to_json: str | None) -> Console:
    """Tables make way for JSON on standard output."""
    from rich.console import Console

    return Console(quiet=to_json == "-")


def _tell(dropped: list[Dropped], warnings: list[str], group: str = "") -> None:
    from madkernels.scaling.fits.runs_table import shortened

    rows = shortened([f"{row.place}: dropped: {row.why}" for row in dropped], TOLD)
    for line in rows + shortened(warnings, TOLD):
        typer.echo(f"warning: {f'{group}: ' if group else ''}{line}", err=True)


def _tell_kinds(count: int) -> None:
    if count:
        typer.echo(f"note: {count} rows of ladders (column kind: overtrained, state) are excluded", err=True)


def _may_write(to_json: str | None, force: bool) -> None:
    from madkernels.files import refuse_existing

    if to_json not in (None, "-"):
        refuse_existing(Path(str(to_json)), force)


def _write(found: dict[str, Any], to_json: str | None) -> None:
    from madkernels.files import write_whole

    if to_json is None:
        return
    text = json.dumps(_plain(found), indent=1, allow_nan=False)
    if to_json == "-":
        print(text)
    else:
        write_whole(Path(to_json), text + "\n")


def _plain(value: Any) -> Any:
    """A value for JSON, which has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
