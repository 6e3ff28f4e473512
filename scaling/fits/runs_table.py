"""Runs from CSV files: the columns that a fit needs; rows that cannot be used are reported by line."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from madkernels.names import did_you_mean
from madkernels.scaling.fits.form import FLOPS, Points
from madkernels.scaling.fits.screening import acceptable, highest, why_not
from madkernels.scaling.fits.statistics import Array

SEPARATORS = ",;\t|"
FINISHED = ("", "done", "finished", "completed", "complete", "success", "succeeded", "ok")  # in a column `status`
UNFINISHED = (
    "crashed",
    "failed",
    "killed",
    "pending",
    "preempted",
    "preempting",
    "queued",
    "running",
)  # in a column `state`
KINDS = ("isoflop", "overtrained", "state")  # of the runs of `madkernels scale plan`
SMALLEST, LARGEST = 1e-60, 1e60  # size, data and FLOPs in any unit; powers of these are finite
FAR_OFF = 10.0  # times 6 N D: more than attention, embeddings or inactive experts account for
TOLD = 10  # rows that are reported of one kind


@dataclass(frozen=True)
class Table:
    """Cells by column, all of one length, and where each row stands: (rows, 2), which of `files` and the line in it."""

    columns: dict[str, list[str]]
    files: tuple[str, ...]
    origin: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.origin)

    def place(self, row: int) -> str:
        """Such as "runs.csv, line 7"."""
        file, line = self.origin[row]
        return f"{self.files[file]}, line {line}"

    def column(self, name: str) -> list[str]:
        """ValueError, with the columns that there are, if it is not one."""
        if name not in self.columns:
            known = ", ".join(self.columns) + did_you_mean(name, self.columns)
            raise ValueError(f"{', '.join(self.files)}: there is no column {name!r}; there are: {known}")
        return self.columns[name]

    def numbers(self, name: str) -> Array:
        """(rows,), NaN for empty cells. ValueError, with the line, for other cells that are no number."""
        cells = self.column(name)
        try:
            return np.array([float(cell) if cell else np.nan for cell in cells], dtype=np.float64)
        except ValueError:
            row = next(row for row, cell in enumerate(cells) if cell and not _is_number(cell))
            expected = "expected a number such as 1.4e9, without units, percent signs or commas"
            raise ValueError(f"{self.place(row)}: {name} is {cells[row]!r}; {expected}") from None

    def where(self, chosen: NDArray[np.bool_]) -> Table:
        return self.rows(np.flatnonzero(chosen))

    def rows(self, chosen: NDArray[np.intp]) -> Table:
        columns = {name: [cells[row] for row in chosen] for name, cells in self.columns.items()}
        return Table(columns, self.files, self.origin[chosen])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# ---- files


def read_table(*paths: Path) -> Table:
    """The rows of all files, which must have the same columns, in any order. ValueError names the file and the line."""
    names = tuple(path.name for path in paths)
    names = names if len(set(names)) == len(names) else tuple(map(str, paths))
    read = [_read(path, name) for path, name in zip(paths, names, strict=True)]
    columns, _ = read[0]
    for name, (other, _) in zip(names, read, strict=True):
        if different := set(other) ^ set(columns):
            told = ", ".join(sorted(different))
            raise ValueError(f"{name}: its columns are not those of {names[0]}; different: {told}")
    joined = {name: list(itertools.chain.from_iterable(other[name] for other, _ in read)) for name in columns}
    lines = [np.stack([np.full(len(at), file), at], 1) for file, (_, at) in enumerate(read)]
    return Table(joined, names, np.concatenate(lines).astype(np.intp))


def _read(path: Path, name: str) -> tuple[dict[str, list[str]], NDArray[np.intp]]:
    """Cells by column, without the blanks around them, and the line of each row. Rows of nothing but blanks are none."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _parse(file, name)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected a CSV file, one run per row") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); save it as CSV in UTF-8") from None


def _parse(lines: Iterator[str], name: str) -> tuple[dict[str, list[str]], NDArray[np.intp]]:
    before = 0
    for head in lines:
        if head.strip(SEPARATORS + " \r\n"):
            break
        before += 1
    else:
        raise ValueError(f"{name} is empty; expected a CSV file with a line of column names")
    reader = csv.reader(itertools.chain([head], lines), delimiter=_separator(head), skipinitialspace=True, strict=True)
    rows, at, last = [], [], before
    try:
        names = [cell.strip() for cell in next(reader)]
        last = before + reader.line_num
        _check_names(names, name, last)
        for cells in reader:
            last = before + reader.line_num
            if len(cells) != len(names):
                if not any(map(str.strip, cells)):
                    continue
                raise ValueError(f"{name}, line {last}: {len(cells)} cells; expected {len(names)}")
            rows.append(cells)
            at.append(last)
    except csv.Error as error:
        raise ValueError(f"{name}, in or after line {last + 1}: {error}; expected quotes in pairs") from None
    columns = [list(map(str.strip, cells)) for cells in zip(*rows, strict=True)] or [[] for _ in names]
    kept = np.flatnonzero([any(cells) for cells in zip(*columns, strict=True)])
    if len(kept) < len(at):
        columns = [[cells[row] for row in kept] for cells in columns]
    named = {column: cells for column, cells in zip(names, columns, strict=True) if column}
    return named, np.array(at, dtype=np.intp)[kept]


def _separator(head: str) -> str:
    """The one that makes the most columns."""
    return max(SEPARATORS, key=lambda mark: len(head.split(mark)))


def _check_names(names: Sequence[str], file: str, line: int) -> None:
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise ValueError(f"{file}, line {line}: the column {', '.join(twice)} is given twice; rename or remove one")


def csv_text(names: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# ---- rows that are used


@dataclass(frozen=True)
class Dropped:
    """A row, or a whole group of them, that is not fitted."""

    place: str
    why: str


@dataclass(frozen=True)
class Selection:
    """The rows to fit, as points with FLOPs (n,) and as they stand in the file; those dropped; and what is odd."""

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


@dataclass(frozen=True)
class Cut:
    """Losses that are dropped: the `highest` highest, and those above `above`."""

    highest: int = 0
    above: float = np.inf

    def __post_init__(self) -> None:
        if not self.above > 0:
            raise ValueError(f"--max-loss: {self.above}; expected a positive number of nats")


def select(table: Table, columns: Columns, cut: Cut | None = None) -> Selection:
    """Rows that are finished and have a sensible loss, without those that the cut takes.

    ValueError where sizes or data are no positive numbers in a row that is otherwise to be used.
    """
    cut = cut or Cut()
    loss = table.numbers(columns.loss)
    reasons = _reasons(table, loss, cut.above)
    kept = np.ones(len(table), dtype=bool)
    kept[list(reasons)] = False
    if cut.highest:
        rows = np.flatnonzero(kept)[highest(loss[kept], cut.highest)]
        reasons |= {int(row): f"the loss is {loss[row]:g}: among the {cut.highest} highest" for row in rows}
        kept[rows] = False
    dropped = [Dropped(table.place(row), reasons[row]) for row in sorted(reasons)]
    if not kept.any():
        told = "; ".join(f"{d.place}: {d.why}" for d in dropped[:3])
        raise ValueError(f"no row can be used: {told}" if dropped else f"{', '.join(table.files)}: no rows")
    table, loss = table.where(kept), loss[kept]
    params, tokens, flops = work(table, columns.params, columns.tokens, columns.flops)
    points = Points(params, tokens, loss)
    return Selection(points, flops, table, dropped, [*_twice(table, points, flops), *_far_off(table, columns, points)])


def _reasons(table: Table, loss: Array, most: float) -> dict[int, str]:
    """For each row that is no result to fit, why."""
    reasons = {row: f"the loss is {loss[row]:g}: above --max-loss {most:g}" for row in np.flatnonzero(loss > most).tolist()}
    reasons |= {row: str(why_not(loss[row])) for row in np.flatnonzero(~acceptable(loss)).tolist()}
    for name, cells in table.columns.items():
        known = {cell: _unfinished(name.lower(), cell.lower()) for cell in set(cells)} if _tells(name) else {}
        if any(known.values()):
            reasons |= {row: f"the run is {cell}" for row, cell in enumerate(cells) if known[cell]}
    return reasons


def _tells(name: str) -> bool:
    return name.lower() in ("status", "state")


def _unfinished(name: str, cell: str) -> bool:
    """Whether a run is not done, by the words of a column `status`, or by those of trackers in a column `state`."""
    return cell not in FINISHED if name == "status" else cell in UNFINISHED


def work(table: Table, params: str, tokens: str | None, flops: str | None) -> tuple[Array, Array, Array]:
    """Parameters, tokens and FLOPs, (rows,), by the names of columns; what is not there follows by C = 6 N D.

    ValueError where one is no positive number.
    """
    n = _positive(table, params, table.numbers(params))
    d = _positive(table, tokens, table.numbers(tokens)) if tokens else None
    with np.errstate(over="ignore", under="ignore"):
        if flops:
            c = _positive(table, flops, table.numbers(flops))
        else:
            c = _positive(table, "6 N D", FLOPS * n * (0 if d is None else d))
        if d is None:
            d = _positive(table, "C / (6 N)", c / (FLOPS * n))
    return n, d, c


def _positive(table: Table, name: str, values: Array) -> Array:
    wrong = np.flatnonzero(~((values > SMALLEST) & (values < LARGEST)))
    if len(wrong):
        value = values[wrong[0]]
        if np.isnan(value):
            raise ValueError(f"{table.place(wrong[0])}: {name} is missing; expected a positive number")
        expected = f"a number between {SMALLEST:g} and {LARGEST:g}" if 0 < value < np.inf else "a positive number"
        raise ValueError(f"{table.place(wrong[0])}: {name} is {value:g}; expected {expected}")
    return values


def _twice(table: Table, points: Points, flops: Array) -> list[str]:
    """Rows with the size, data, FLOPs and loss of an earlier one: of one run, they make intervals too narrow."""
    cells = np.stack([points.params, points.tokens, flops, points.loss])
    order = np.lexsort(cells)
    again = (cells[:, order[1:]] == cells[:, order[:-1]]).all(0)
    if not again.any():
        return []
    first = order[np.maximum.accumulate(np.where(np.r_[True, ~again], np.arange(len(order)), 0))]
    pairs = sorted(zip(order[1:][again].tolist(), first[1:][again].tolist(), strict=True))
    told = "; ".join(f"{table.place(row)}, as {table.place(other)}" for row, other in pairs[:3])
    more = f"; and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    advice = "remove all but one, else intervals come out too narrow"
    return [f"rows that repeat the size, data and loss of another: {told}{more}. If they are one run, {advice}"]


def _far_off(table: Table, columns: Columns, points: Points) -> list[str]:
    """Rows where C = 6 N D does not hold by far, as far as the file has both; a column of the usual name is enough."""
    if columns.tokens:
        name, expected = columns.flops or "flops", FLOPS * points.params * points.tokens
    else:
        name, expected = "tokens", points.tokens
    if name not in table.columns:
        return []
    values = table.numbers(name)
    with np.errstate(over="ignore", under="ignore"):
        far = (values > 0) & ~((values > expected / FAR_OFF) & (values / FAR_OFF < expected))
    lines = [f"{name} is {values[i]:.3g}, far from the {expected[i]:.3g} of C = 6 N D" for i in np.flatnonzero(far)[:TOLD]]
    return by_row(table, np.flatnonzero(far), lines)


def by_row(table: Table, rows: NDArray[np.intp], lines: Sequence[str]) -> list[str]:
    """What is said of the first rows, each with its place, and how many more there are."""
    told = [f"{table.place(row)}: {line}" for row, line in zip(rows.tolist(), lines, strict=False)]
    return told + ([f"and {len(rows) - len(told)} more rows like these"] if len(rows) > len(told) else [])


def shortened(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


# ---- parts of a table


def by_group(table: Table, *columns: str) -> Iterator[tuple[str, Table]]:
    """Parts of the table with one value in each of the columns, in the order of their first rows; all of it without any."""
    if not columns:
        yield "", table
        return
    rows: dict[str, list[int]] = {}
    for row, values in enumerate(zip(*(table.column(name) for name in columns), strict=True)):
        rows.setdefault(", ".join(values), []).append(row)
    for name, chosen in rows.items():
        yield name, table.rows(np.array(chosen))


def kinds_of(table: Table) -> list[str]:
    """By row, one of KINDS. Rows of other kinds, or of a file without them, are as those that sizes are compared in."""
    return [cell if cell in KINDS else KINDS[0] for cell in table.columns.get("kind", [""] * len(table))]


def of_kind(table: Table, *kinds: str) -> Table:
    """Rows of some of KINDS. ValueError where all are of others."""
    found = kinds_of(table)
    if found and not set(found) & set(kinds):
        raise ValueError(
            f"{', '.join(table.files)}: no rows of kind {' or '.join(kinds)}: all are {', '.join(sorted(set(found)))}"
        )
    return table.where(np.array([kind in kinds for kind in found], dtype=bool))
