"""`madkernels scale fit`, `compare`, `correlate` and `report`: laws from the results of runs, in any CSV file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # numpy and scipy are loaded when a command runs, not to print its help
    from rich.console import Console

    from madkernels.scaling.table import Dropped

File = Annotated[Path, typer.Argument(help="A CSV file, one run a row.")]
Params = Annotated[str, typer.Option(help="Column of parameters.")]
Tokens = Annotated[str | None, typer.Option(help="Column of tokens trained on.")]
Flops = Annotated[str | None, typer.Option(help="Column of operations; without tokens D = C / (6 N).")]
Loss = Annotated[str, typer.Option(help="Column of the loss, in nats a token.")]
Group = Annotated[str | None, typer.Option(help="Column; one fit for each of its values.")]
DropHighest = Annotated[int, typer.Option(min=0, help="Leave out so many of the highest losses.")]
Resamples = Annotated[int, typer.Option("--bootstrap", min=0, help="Resamples for intervals.")]
Seed = Annotated[int, typer.Option(help="Of the resamples.")]
Json = Annotated[str | None, typer.Option("--json", help="Write JSON to this file, or to standard output: -.")]


def fit(
    file: File,
    params: Params,
    loss: Loss,
    tokens: Tokens = None,
    flops: Flops = None,
    group: Group = None,
    drop_highest: DropHighest = 0,
    approach: Annotated[int, typer.Option(min=1, max=3, help="1: envelope, 2: a curve a budget, 3: surface.")] = 3,
    budget: Annotated[
        str | None, typer.Option(help="Approach 2: column of budgets, or budgets with commas between.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Approach 2: parabola, cubic or akima.")] = "parabola",
    delta: Annotated[float, typer.Option(help="Where Huber's loss turns from squares to absolute values.")] = 1e-3,
    lad: Annotated[bool, typer.Option("--lad", help="Least absolute deviations: delta towards 0.")] = False,
    tied: Annotated[bool, typer.Option("--tied", help="alpha = beta.")] = False,
    bootstrap: Resamples = 1000,
    seed: Seed = 42,
    at: Annotated[list[float] | None, typer.Option(help="A budget to find the optimal size for; give several.")] = None,
    to_json: Json = None,
) -> None:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta, or find the best sizes, and show how sure that is."""
    from madkernels.scaling import summary
    from madkernels.scaling.laws import LAD
    from madkernels.scaling.table import Columns, by_group, of_kind, read_table, select

    if approach == 3 and tokens and flops:
        raise ValueError("approach 3 takes the data of a run from --tokens or from --flops: both are given")
    columns = Columns(params, loss, tokens, flops)
    # Runs with more or less state are of other architectures; one size at several budgets is no curve over sizes.
    rows = of_kind(read_table(file), "isoflop", *(["overtrained"] if approach == 3 else []))
    parts = {name: select(part, columns, drop_highest) for name, part in by_group(rows, group)}
    console = _console(to_json)
    found: dict[str, Any] = {}
    for name, selection in parts.items():
        _tell(selection.dropped, selection.warnings)
        with _named(name):
            if approach == 3:
                told = summary.summarise(selection, LAD if lad else delta, tied, bootstrap, seed)
                found[name] = summary.as_json(told, at or [])
                tables = summary.tables(told, name, at or [])
            else:
                best = summary.best_sizes(selection, approach, budget, shape, bootstrap, seed)
                found[name] = summary.best_as_json(best, selection, approach, shape)
                tables = [summary.best_table(best, approach, name)]
        for table in tables:
            console.print(table)
    _write(found[""] if group is None else {"groups": found}, to_json)


Files = Annotated[list[Path], typer.Argument(help="CSV files of runs, such as runs.csv of scale run.")]
By = Annotated[str, typer.Option(help="Column that tells architectures apart.")]
Budget = Annotated[str, typer.Option(help="Column of nominal budgets.")]
Shape = Annotated[str, typer.Option(help="Of the curves over sizes: parabola, cubic or akima.")]


def compare(
    files: Files,
    group: By = "architecture",
    params: Params = "params",
    tokens: Tokens = "tokens",
    flops: Flops = "flops",
    loss: Loss = "loss",
    budget: Budget = "budget",
    shape: Shape = "parabola",
    bootstrap: Resamples = 1000,
    seed: Seed = 42,
    to_json: Json = None,
) -> None:
    """Compare architectures with the first: exponent of the best size, least loss at each budget, where they cross."""
    from madkernels.scaling.compare import Sampling, difference_table, frontiers
    from madkernels.scaling.compare import compare as differences
    from madkernels.scaling.table import Columns, read_table

    columns = Columns(params, loss, tokens, flops)
    by_name, dropped = frontiers(read_table(*files), columns, group, budget, Sampling(shape, bootstrap, seed))
    _tell(dropped, [f"{name}: {why}" for name, found in by_name.items() for why in found.left_out])
    found = differences(by_name)
    _console(to_json).print(difference_table(found))
    rows = {name: {"a": f.a, "best": [asdict(b) for b in f.best], "left_out": f.left_out} for name, f in by_name.items()}
    _write({"architectures": rows, "differences": [asdict(difference) for difference in found]}, to_json)


def correlate(
    scores: Annotated[Path, typer.Argument(help="results.csv of madkernels mad run.")],
    runs: Files,
    at: Annotated[float | None, typer.Option(help="Budget; the largest that all architectures have if absent.")] = None,
    group: By = "architecture",
    params: Params = "params",
    tokens: Tokens = "tokens",
    flops: Flops = "flops",
    loss: Loss = "loss",
    budget: Budget = "budget",
    shape: Shape = "parabola",
    seed: Seed = 42,
    to_json: Json = None,
) -> None:
    """Relate MAD scores to the least loss at a budget, for each task and their mean."""
    from madkernels.scaling.compare import Sampling, frontiers
    from madkernels.scaling.correlate import correlate as relate
    from madkernels.scaling.correlate import correlation_table, labels_of, losses_at, read_scores
    from madkernels.scaling.table import Columns, read_table

    table = read_table(*runs)
    by_name, dropped = frontiers(table, Columns(params, loss, tokens, flops), group, budget, Sampling(shape, 0, seed))
    _tell(dropped, [f"{name}: {why}" for name, found in by_name.items() for why in found.left_out])
    chosen, losses = losses_at(by_name, at)
    rows = relate(read_scores(read_table(scores), labels_of(table, group)), losses, seed)
    _console(to_json).print(correlation_table(rows, chosen))
    _write({"budget": chosen, "losses": losses, "tasks": [asdict(row) for row in rows]}, to_json)


def report(
    files: Files,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("scaling.html"),
    scores: Annotated[Path | None, typer.Option(help="MAD scores: results.csv of madkernels mad run.")] = None,
    group: By = "architecture",
    params: Params = "params",
    tokens: Tokens = "tokens",
    flops: Flops = "flops",
    loss: Loss = "loss",
    budget: Budget = "budget",
    shape: Shape = "parabola",
    bootstrap: Resamples = 1000,
    seed: Seed = 42,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Scaling laws",
) -> None:
    """Write the runs, their laws and what is missing as one HTML page with its pictures inside."""
    from rich.console import Console

    from madkernels.scaling.compare import Sampling
    from madkernels.scaling.report import page
    from madkernels.scaling.table import Columns, read_table

    columns, how = Columns(params, loss, tokens, flops), Sampling(shape, bootstrap, seed)
    text = page(read_table(*files), read_table(scores) if scores else None, columns, group, budget, how, title)
    out.write_text(text, encoding="utf-8")
    Console().print(f"Report: {out}", soft_wrap=True)


def _console(to_json: str | None) -> Console:
    """Tables make way for JSON on standard output."""
    from rich.console import Console

    return Console(quiet=to_json == "-")


def _tell(dropped: list[Dropped], warnings: list[str]) -> None:
    for line in [*(f"{row.place}: dropped: {row.why}" for row in dropped), *warnings]:
        typer.echo(f"warning: {line}", err=True)


@contextmanager
def _named(group: str) -> Iterator[None]:
    """Says of which group an error is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{group}: {error}" if group else str(error)) from error


def _write(found: dict[str, Any], to_json: str | None) -> None:
    if to_json is None:
        return
    text = json.dumps(_plain(found), indent=1, allow_nan=False)
    if to_json == "-":
        print(text)
    else:
        Path(to_json).write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
