"""`--where`: conditions on columns; nothing else is read, and nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from madkernels.scaling.fits.condition import rows_where
from madkernels.scaling.fits.runs_table import Table, read_table


@pytest.fixture
def table(tmp_path: Path) -> Table:
    path = tmp_path / "runs.csv"
    path.write_text("name,loss,Model Size,outlier,low\na,1,10,True,0\nb,2,20,False,3\nc,3.5,30,false,1\nd,,-40,,1\n")
    return read_table(path)


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("loss < 3", "ab"),
        ("loss <= 2 and loss != 1", "b"),
        ("loss > 2 or name == 'a'", "ac"),
        ("not loss > 2", "abd"),
        ("name == 'a' or name == 'b' and loss > 5", "a"),
        ("(name == 'a' or name == 'b') and loss > 1", "b"),
        ("1 < loss < 3.5", "b"),
        ("2 >= loss", "ab"),
        ("`Model Size` > 1.5e1", "bc"),
        ("`Model Size` == -40", "d"),
        ("loss > low", "ac"),
        ("outlier == False", "bc"),
        ("outlier == True", "a"),
        ("outlier != True", "bcd"),
        ("outlier == 'False'", "b"),
        ("name >= 'c'", "cd"),
        ("loss != 1", "bcd"),
    ],
)
def test_rows(table: Table, condition: str, kept: str) -> None:
    assert "".join(rows_where(table, condition).column("name")) == kept


def test_rows_keep_their_lines(table: Table) -> None:
    assert rows_where(table, "name == 'c'").place(0) == "runs.csv, line 4"


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("los < 3", "there is no column 'los'; there are: name, loss, Model Size, outlier, low; did you mean loss?"),
        ("loss < 3 and optimiser == 'x'", "there is no column 'optimiser'"),
        ("`Model` > 3", "there is no column 'Model'"),
        ("name < 3", "line 2: name is 'a'; expected a number"),
        ("loss < 0", "--where loss < 0: none of 4 rows meets it"),
        *((text, "cannot be read; expected columns compared") for text in (
            "", "loss", "loss <", "loss = 3", "1 < 2", "loss + 1 < 3", "loss < -'a'", "loss in (1, 2)", "loss is None",
            "loss < None", "__import__('os').system('true') == 0", "loss.real < 3", "loss[0] < 3", "(lambda: 1)() < loss",
            "loss < 10 ** 10", f"loss < {'9' * 400}", "(" * 300 + "loss < 3" + ")" * 300, "loss < 1j", "f'{name}' == name",
            "(loss := 3) < 4", "loss < 3 if loss else loss < 2", "\0loss < 3",
        )),
    ],
)  # fmt: skip
def test_refused(table: Table, condition: str, told: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        rows_where(table, condition)
    assert told in str(error.value)
