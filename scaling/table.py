"""Runs from CSV files: the columns that a fit needs, rows that cannot be used told by line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from madkernels.scaling.laws import FLOPS, Points
from madkernels.scaling.newton import Array
from madkernels.scaling.screening import highest, why_not

UNFINISHED = ("planned", "running", "failed")  # in a column `status`
FAR_OFF = 10.0  # times 6 N D: more than attention, embeddings or inactive experts account for


@dataclass(frozen=True)
class Table:
    """Cells by column, all of one length, and where each row stands."""

    columns: dict[str, list[str]]
    places: list[str]  # such as "runs.csv, line 7"

    def __len__(self) -> int:
        return len(self.places)

    def column(self, name: str) -> list[str]:
        """ValueError, with the columns that there are, if it is not one."""
        if name not in self.columns:
            raise ValueError(f"there is no column {name!r}; there are: {', '.join(self.columns)}")
        return self.columns[name]

    def numbers(self, name: str) -> Array:
        """(rows,), NaN for empty cells. ValueError, with the line, for other cells that are no number."""
        return np.array([_number(cell, name, place) for cell, place in zip(self.column(name), self.places, strict=True)])

    def where(self, chosen: NDArray[np.bool_]) -> Table:
        rows = np.flatnonzero(chosen)
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return Table(columns, [self.places[row] for row in rows])


def _number(cell: str, name: str, place: str) -> float:
    if not cell.strip():
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{place}: {name} is {cell!r}; expected a number") from None


def read_table(*paths: Path) -> Table:
    """The rows of all files, which must have the same columns, in any order."""
    tables = [_read(path) for path in paths]
    names = list(tables[0].columns)
    for path, table in zip(paths, tables, strict=True):
        if set(table.columns) != set(names):
            different = ", ".join(sorted(set(table.columns) ^ set(names)))
            raise ValueError(f"{path}: its columns are not those of {paths[0]}; different: {different}")
    columns = {name: [cell for table in tables for cell in table.columns[name]] for name in names}
    return Table(columns, [place for table in tables for place in table.places])


def _read(path: Path) -> Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        names = next(reader, None)
        if not names:
            raise ValueError(f"{path} is empty; expected a CSV file with a line of column names")
        rows = [(cells, f"{path.name}, line {reader.line_num}") for cells in reader if cells]
    for cells, place in rows:
        if len(cells) != len(names):
            raise ValueError(f"{place}: {len(cells)} cells; expected {len(names)}")
    return Table({name: [cells[i] for cells, _ in rows] for i, name in enumerate(names)}, [place for _, place in rows])


@dataclass(frozen=True)
class Dropped:
    """A row that is not fitted."""

    place: str
    why: str


@dataclass(frozen=True)
class Selection:
    """The rows to fit, as points with operations (n,) and as they stand in the file; those dropped; and what is odd."""

    points: Points
    flops: Array
    table: Table
    dropped: list[Dropped]
    warnings: list[str]


@dataclass(frozen=True)
class Columns:
    """Names of columns. Without tokens D = C / (6 N), without flops C = 6 N D: one of them must be there."""

    params: str
    loss: str
    tokens: str | None = None
    flops: str | None = None

    def __post_init__(self) -> None:
        if self.tokens is None and self.flops is None:
            raise ValueError("the data of a run comes from --tokens or from --flops: none is given")


def select(table: Table, columns: Columns, drop_highest: int = 0) -> Selection:
    """Rows that are finished and have a sensible loss, without the `drop_highest` of the highest losses.

    ValueError where sizes or data are no positive numbers in a row that is otherwise to be used.
    """
    loss = table.numbers(columns.loss)
    reasons = [_reason(value, status) for value, status in zip(loss, _statuses(table), strict=True)]
    kept = np.array([reason is None for reason in reasons], dtype=bool)
    if drop_highest:
        rows = np.flatnonzero(kept)[highest(loss[kept], drop_highest)]
        for row in rows:
            reasons[row], kept[row] = f"the loss is {loss[row]:g}: among the {drop_highest} highest", False
    dropped = [Dropped(place, why) for place, why in zip(table.places, reasons, strict=True) if why]
    if not kept.any():
        raise ValueError(
            "no row can be used: " + "; ".join(f"{d.place}: {d.why}" for d in dropped[:3]) if dropped else "no rows"
        )
    table = table.where(kept)
    params = _positive(table, columns.params)
    tokens = _positive(table, columns.tokens) if columns.tokens else None
    flops = _positive(table, columns.flops) if columns.flops else FLOPS * params * (0 if tokens is None else tokens)
    points = Points(params, flops / (FLOPS * params) if tokens is None else tokens, loss[kept])
    return Selection(points, flops, table, dropped, _far_off(table, columns, points))


def by_group(table: Table, group: str | None) -> Iterator[tuple[str, Table]]:
    """Parts of the table with one value in the column, in the order of their first rows; all of it where there is none."""
    if group is None:
        yield "", table
        return
    names = table.column(group)
    for name in dict.fromkeys(names):
        yield name, table.where(np.array([other == name for other in names]))


def of_kind(table: Table, *kinds: str) -> Table:
    """Rows of some kinds of plan, where the file has a column `kind`."""
    if "kind" not in table.columns:
        return table
    return table.where(np.array([cell in kinds for cell in table.column("kind")], dtype=bool))


def _statuses(table: Table) -> Sequence[str]:
    return table.columns.get("status", [""] * len(table))


def _reason(loss: float, status: str) -> str | None:
    if status in UNFINISHED:
        return f"the run is {status}"
    return why_not(loss)


def _positive(table: Table, name: str) -> Array:
    values = table.numbers(name)
    for value, place in zip(values, table.places, strict=True):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{place}: {name} is {value:g}; expected a positive number")
    return values


def _far_off(table: Table, columns: Columns, points: Points) -> list[str]:
    """Rows where C = 6 N D does not hold by far, as far as the file has both; a column of the usual name is enough."""
    if columns.tokens:
        name, expected = columns.flops or "flops", FLOPS * points.params * points.tokens
    else:
        name, expected = "tokens", points.tokens
    if name not in table.columns:
        return []
    return [
        f"{place}: {name} is {value:.3g}, far from the {about:.3g} of C = 6 N D"
        for value, about, place in zip(table.numbers(name), expected, table.places, strict=True)
        if value > 0 and not 1 / FAR_OFF < value / about < FAR_OFF
    ]
