"""Folders of runs on the terminal: a line of totals over a matrix of architectures and tasks, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from madkernels.live.watched import SCALING, Cell, Seen, Watched
from madkernels.reporting.tables import Table

Cells = dict[tuple[str, str], Cell]


def show(watched: Watched, console: Console) -> None:
    """Prints how far a folder is."""
    console.print(rendered(watched, watched.see(), console), soft_wrap=True)


def watch(folders: Sequence[Watched], console: Console, every: float) -> None:
    """Redraws until nothing runs any more, or Ctrl-C; where no terminal is: a line per change.

    Args:
        every: seconds between two looks.
    """
    with suppress(KeyboardInterrupt):
        if not console.is_terminal:
            _print_changes(folders, console, every)
            return
        with Live(console=console, auto_refresh=False) as screen:
            for seen in _looks(folders, every):
                parts = [rendered(w, s, console) for w, s in zip(folders, seen, strict=True)]
                screen.update(Group(*parts), refresh=True)


def _print_changes(folders: Sequence[Watched], console: Console, every: float) -> None:
    said: dict[Watched, str] = {}
    for seen in _looks(folders, every):
        for watched, now in zip(folders, seen, strict=True):
            if said.get(watched) != now.headline:
                said[watched] = now.headline
                name = f"{watched.folder}: " if len(folders) > 1 else ""
                console.print(f"{time.strftime('%H:%M:%S')} {name}{now.line}", markup=False, highlight=False, soft_wrap=True)


def _looks(folders: Sequence[Watched], every: float) -> Iterator[list[Seen]]:
    while True:
        seen = [watched.see() for watched in folders]
        yield seen
        if not any(now.live for now in seen):
            return
        time.sleep(every)


def rendered(watched: Watched, seen: Seen, console: Console) -> RenderableType:
    lines = [Text(f"{watched.folder}: {seen.line}", style="bold")]
    below = [Text(f"- {line}") for line in (*seen.running, *seen.failed)]
    return Group(*lines, *matrix(seen.cells, "budget" if seen.kind == SCALING else "task", console), *below)


def matrix(cells: Cells, column: str, console: Console) -> list[RichTable]:
    """Architectures by tasks, or tasks by architectures where that takes fewer tables of the console's width."""
    turned = {(task, arch): cell for (arch, task), cell in cells.items()}
    upright, across = (_table(*of).parts(console) if cells else [] for of in ((cells, "architecture"), (turned, column)))
    return across if len(across) < len(upright) else upright


def _table(cells: Cells, corner: str) -> Table:
    table = Table(corner)
    columns = list(dict.fromkeys(column for _, column in cells))
    for column in columns:
        longest = max(len(line) for (_, name), cell in cells.items() if name == column for line in cell.lines())
        table.add_column(Text(column), min_width=longest)
    for row in dict.fromkeys(row for row, _ in cells):
        found = [cells.get((row, column)) for column in columns]
        table.add_row(Text(row), *("\n".join(cell.lines()) if cell else "-" for cell in found))
    return table
