"""Tables for the terminal, in which no name and no number is cut, however narrow it is.

Cells wrap at words. Where that is not enough, spare columns go, and the caption names them; then the others are shown in
several parts, each with the first column. In a pipe or a file the table is as wide as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table as RichTable

WIDEST = 10_000  # characters of a cell


class Table(RichTable):
    """A table of rich, with the columns that can be spared where there is no room, by their headers: least worth first."""

    def __init__(self, *headers: str, spare: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*headers, **options)
        self.spare = spare

    def show(self, console: Console) -> None:
        """Prints it, whole."""
        for part in self.parts(console):
            console.print(part, crop=False)

    def parts(self, console: Console) -> list[RichTable]:
        """The tables that it takes on this console, one below the other."""
        least, full = zip(*(_widths(console, column) for column in self.columns), strict=True)
        chosen = list(range(len(self.columns)))
        if not console.is_terminal:
            return [self._part(chosen, full, self.title, self.caption)]
        headers, dropped = [column.header for column in self.columns], list[str]()
        for name in self.spare:
            if self._width(console, chosen, least) <= console.width:
                break
            chosen.remove(headers.index(name))
            dropped.append(name)
        told = f"No room for: {', '.join(dropped)}." if dropped else ""
        caption = f"{self.caption or ''}\n{told}".strip()
        parts = self._columns_by_part(console, chosen, least)
        found = []
        for number, part in enumerate(parts):
            widths = self._fitted(console, part, least, full)
            first, last = number == 0, number == len(parts) - 1
            found.append(self._part(part, widths, self.title if first else None, caption if last else None))
        return found

    def _columns_by_part(self, console: Console, chosen: list[int], least: Sequence[int]) -> list[list[int]]:
        """Columns by part, each of which fits; one with the first column and another may not."""
        parts = [chosen[:2]]
        for i in chosen[2:]:
            if self._width(console, [*parts[-1], i], least) <= console.width:
                parts[-1].append(i)
            else:
                parts.append([chosen[0], i])
        return parts

    def _fitted(self, console: Console, chosen: list[int], least: Sequence[int], full: Sequence[int]) -> list[int]:
        """The widths of all columns; of those chosen the widest gives way until they fit, none below its least."""
        widths = list(full)
        excess = self._width(console, chosen, widths) - console.width
        for _ in range(excess):
            narrower = [i for i in chosen if widths[i] > least[i]]
            if not narrower:
                break
            widths[max(narrower, key=lambda i: widths[i])] -= 1
        return widths

    def _width(self, console: Console, chosen: list[int], widths: Sequence[int]) -> int:
        options = console.options.update(max_width=WIDEST)
        return Measurement.get(console, options, self._part(chosen, widths, None, None, rows=False)).maximum

    def _part(
        self,
        chosen: list[int],
        widths: Sequence[int],
        title: Any,
        caption: Any,
        *,
        rows: bool = True,
    ) -> RichTable:
        part = RichTable(box=self.box, title_justify=self.title_justify)
        for i in chosen:
            column = self.columns[i]
            part.add_column(column.header, justify=column.justify, style=column.style, width=widths[i], overflow="fold")
        if not rows:
            return part
        cells = [list(self.columns[i].cells) for i in chosen]
        for row, *texts in zip(self.rows, *cells, strict=True):
            part.add_row(*texts, style=row.style, end_section=row.end_section)
        part.title, part.caption = title, caption
        part.width = self._width(Console(width=WIDEST), chosen, widths)
        return part


def _widths(console: Console, column: Column) -> tuple[int, int]:
    """The least width of a column, at which no word is cut, and that at which nothing wraps."""
    options = console.options.update(max_width=WIDEST)
    found = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    full = max(measured.maximum for measured in found)
    full = max(full, column.min_width or 0)
    return full if column.no_wrap else max(column.min_width or 0, *(measured.minimum for measured in found)), full
