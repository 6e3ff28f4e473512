"""The parts of reports: in a browser nothing is wider than the window, and every label of a picture can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import after_scripts, assert_fits, measured
from markupsafe import Markup

from madkernels.reporting import pages
from madkernels.reporting.figures import Panel, log_ticks, number
from madkernels.reporting.pages import Section


def test_a_table_of_many_long_columns_fits(tmp_path: Path) -> None:
    """As wide as MAD scores get: long architectures, intervals, and more tasks than there are."""
    head = ["architecture", "MAD score", *(f"selective-copying-{i}" for i in range(9))]
    lines = [["hyena:order=8 moe:experts=8,top_k=2 attention:heads=4 swiglu", *["90.3 ± 11.6"] * 10]] * 3
    panel = Panel("A long title of a panel, such as an architecture's", lambda axes: axes.semilogx([2e6, 3e6], [1, 2]))
    shown = Section("Scores", [pages.table(head, lines), pages.figure([panel] * 3, "Drawn.", {lines[0][0]: "#0072b2"})])
    assert_fits(pages.document("T" * 60, "Facts.", [f"gap {'x' * 200}"] * 7, [shown]), tmp_path)


def test_what_is_too_wide_is_found(tmp_path: Path) -> None:
    """Of the test itself: a table that takes more than a phone has, and one that scrolls within its place."""
    row = "<td style='white-space: nowrap'>" + "wide " * 15 + "</td>"
    table = Markup(f"<table><tr>{row}</tr></table>")
    (phone, _), (desk, _), _ = measured(pages.document("t", "", [], [Section("s", [table])]), tmp_path)
    assert any("<table" in element for element in phone)
    assert not desk
    hidden = Markup(f"<div style='overflow-x: auto'>{table}</div>")
    (phone, _), _, _ = measured(pages.document("t", "", [], [Section("s", [hidden])]), tmp_path)
    assert any("<div" in element for element in phone)


def test_a_click_on_a_column_sorts_by_it(tmp_path: Path) -> None:
    """Numbers from the largest down, then from the smallest up, and what is none last."""
    lines = [["a", "9.5"], ["b", "-"], ["c", "1,200"], ["d", "30 ± 2"]]
    page = pages.document("t", "", [], [Section("s", [pages.table(["name", "score"], lines)])])
    for clicks, order in ((0, "abcd"), (1, "cdab"), (2, "adcb")):
        click = "<script>" + "document.querySelectorAll('thead button')[1].click();" * clicks + "</script></body>"
        shown = after_scripts(page.replace("</body>", click), tmp_path)
        assert "".join(re.findall(r'<th scope="row">(.)', shown)) == order


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.9e6, 2.6e6, ["2\u00d710⁶", "2.25\u00d710⁶", "2.5\u00d710⁶"]),
        (2.5e11, 3e12, ["5\u00d710¹¹", "10¹²", "2\u00d710¹²"]),
        (900, 20_000, ["1,000", "3,000", "10,000"]),
        (1e17, 1e25, ["10¹⁷", "10²⁰", "10²³"]),
    ],
)
def test_ticks_of_logarithmic_axes_are_few_and_differ(low: float, high: float, labels: list[str]) -> None:
    ticks = log_ticks(low, high)
    assert [number(tick, max(ticks) < 1e5) for tick in ticks] == labels
