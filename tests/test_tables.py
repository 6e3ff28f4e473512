"""Tables in the terminal: no name and no number is cut, at any width, and what has no room is named."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from madkernels.reporting.tables import Table

COLUMNS = ("architecture", "budget", "parameters", "tokens per parameter", "loss")
ROWS = (
    ("striped-hyena-experts-moe", "2.7e+12", "1,171,904", "20.4", "1.6257 (1.5123 to 1.7001)"),
    ("mamba:dstate=4 swiglu attention:heads=4 swiglu", "9e+11", "123,456,789,012", "8.8", "1.8"),
)


def table(*spare: str) -> Table:
    made = Table(title="A title", caption="A caption.", spare=spare)
    for name in COLUMNS:
        made.add_column(name, justify="left" if name == "architecture" else "right")
    for row in ROWS:
        made.add_row(*row)
    return made


def shown(made: Table, width: int, *, terminal: bool = True) -> str:
    file = io.StringIO()
    made.show(Console(file=file, width=width, force_terminal=terminal, color_system=None))
    return file.getvalue()


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\s│┃]+", text))


@pytest.mark.parametrize("width", [10, 30, 40, 50, 60, 70, 80, 90, 100, 140])
@pytest.mark.parametrize("spare", [(), ("tokens per parameter", "budget")])
def test_no_word_of_a_table_is_cut(width: int, spare: tuple[str, ...]) -> None:
    printed = shown(table(*spare), width)
    told = " ".join(printed.split()).partition("No room for: ")[2].rstrip(".").split(", ")
    kept = [i for i, name in enumerate(COLUMNS) if name not in told]
    assert words(" ".join(row[i] for row in (COLUMNS, *ROWS) for i in kept)) <= words(printed)
    assert "…" not in printed


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_table_is_no_wider_than_the_terminal(width: int) -> None:
    assert max(map(len, shown(table("budget"), width).splitlines())) <= width


def test_a_pipe_gets_every_column_on_one_line_of_each_row() -> None:
    printed = shown(table("budget"), 40, terminal=False)
    for row in (COLUMNS, *ROWS):
        assert any(all(cell in line for cell in row) for line in printed.splitlines())
    assert "No room" not in printed


def test_columns_go_in_order_of_worth_and_only_as_many_as_have_to() -> None:
    made = table("tokens per parameter", "budget")
    printed = [" ".join(shown(made, width).split()) for width in range(140, 60, -1)]
    assert "No room" not in printed[0]
    first = next(text for text in printed if "No room" in text)
    assert "A caption. No room for: tokens per parameter." in first
    assert "2.7e+12" in first
    assert "20.4" not in first
    assert any("No room for: tokens per parameter, budget." in text for text in printed)


def test_what_cannot_be_dropped_goes_on_below_with_the_first_column() -> None:
    printed = shown(table(), 60)
    assert printed.count("striped-hyena-experts-moe") > 1
    assert printed.count("1.6257") == 1
    assert printed.count("A title") == printed.count("A caption.") == 1
