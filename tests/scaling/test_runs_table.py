"""Tables as people have them: each is read rightly, or refused in one line that names the file and the line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from madkernels.scaling.fits.runs_table import (
    Columns,
    Cut,
    Selection,
    Table,
    by_group,
    csv_text,
    of_kind,
    read_table,
    select,
)

HEAD, ROWS = "N,D,L", ("1e8,1e9,3.5", "2e8,2e9,3.2", "4e8,4e9,3.0")
COLUMNS = Columns("N", "L", "D")


def table(path: Path, *lines: str, end: str = "\n") -> Table:
    path.write_bytes(end.join(lines).encode())
    return read_table(path)


def chosen(path: Path, *lines: str, cut: Cut | None = None) -> Selection:
    return select(table(path, *lines), COLUMNS, cut)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.csv"


# ---- what is read


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|", " , "])
def test_separators_and_ends_of_lines(path: Path, mark: str, end: str) -> None:
    found = table(path, "\ufeff" + HEAD.replace(",", mark), "", *(row.replace(",", mark) for row in ROWS), end=end)
    assert found.columns == {
        "N": ["1e8", "2e8", "4e8"], "D": ["1e9", "2e9", "4e9"], "L": ["3.5", "3.2", "3.0"]
    }  # fmt: skip
    assert found.place(0) == "runs.csv, line 3"


def test_quotes_blank_rows_and_columns_without_a_name(path: Path) -> None:
    quoted = [f',"{row.replace(",", chr(34) + "," + chr(34))}",,' for row in ROWS]
    found = table(path, "", f", {HEAD},,", quoted[0], ",,,,,", " , ", "", *quoted[1:])
    assert list(found.columns) == ["N", "D", "L"]
    assert found.numbers("L").tolist() == [3.5, 3.2, 3.0]
    assert [found.place(row) for row in range(3)] == [f"runs.csv, line {line}" for line in (3, 7, 8)]
    split = table(path, HEAD + ",note", '1,2,3,"two\nlines"', "4,5,6,")
    assert split.columns["note"] == ["two\nlines", ""]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = tmp_path / "runs.csv", tmp_path / "a" / "runs.csv"
    paths[0].write_text("N,D,L\n1,2,3\n")
    paths[1].write_text("L,N,D\n3,1,2\n4,1,2\n")
    found = read_table(*paths)
    assert found.numbers("L").tolist() == [3, 3, 4]
    assert found.place(2) == f"{paths[1]}, line 3"
    paths[1].write_text("L,N\n1,2\n")
    with pytest.raises(ValueError, match=r"a/runs\.csv: its columns are not those of .*runs\.csv; different: D"):
        read_table(*paths)


def test_what_is_written_is_read(path: Path) -> None:
    path.write_text(csv_text(["N", "what"], [{"N": 1.5, "what": 'a, "b"\nc'}]), newline="")
    assert read_table(path).columns == {"N": ["1.5"], "what": ['a, "b"\nc']}


# ---- what is refused


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("",), "runs.csv is empty; expected a CSV file with a line of column names"),
        ((",,", " "), "runs.csv is empty"),
        ((HEAD,), "runs.csv: no rows"),
        ((HEAD, "1,2"), "runs.csv, line 2: 2 cells; expected 3"),
        ((HEAD, *ROWS, "1,2,3,4"), "runs.csv, line 5: 4 cells; expected 3"),
        (("N,D,L,L", "1,2,3,4"), "runs.csv, line 1: the column L is given twice; rename or remove one"),
        (("N,D, L ,L", "1,2,3,4"), "the column L is given twice"),
        ((HEAD, ROWS[0], '1,2,"3', *ROWS), "runs.csv, in or after line 3: unexpected end of data; expected quotes in pairs"),
        ((HEAD, f'"{"x" * 200_000}",2,3'), "runs.csv, in or after line 2: field larger than field limit"),
        ((HEAD, '"1,000,000",2,3'), "runs.csv, line 2: N is '1,000,000'; expected a number such as 1.4e9, without units"),
        ((HEAD, ROWS[0], "70M,2,3"), "runs.csv, line 3: N is '70M'; expected a number"),
        ((HEAD, "1,2,3%"), "runs.csv, line 2: L is '3%'; expected a number"),
        (("N;D;L", "1;2;3,5"), "runs.csv, line 2: L is '3,5'; expected a number"),
        ((HEAD, ",2,3"), "runs.csv, line 2: N is missing; expected a positive number"),
        ((HEAD, "nan,2,3"), "runs.csv, line 2: N is missing; expected a positive number"),
        ((HEAD, "inf,2,3"), "runs.csv, line 2: N is inf; expected a positive number"),
        ((HEAD, "1,0,3"), "runs.csv, line 2: D is 0; expected a positive number"),
        ((HEAD, "1,-2,3"), "runs.csv, line 2: D is -2; expected a positive number"),
        ((HEAD, "1e308,2,3"), r"runs.csv, line 2: N is 1e\+308; expected a number between 1e-60 and 1e\+60"),
        (("N,D,loss", "1,2,3"), "runs.csv: there is no column 'L'; there are: N, D, loss"),
    ],
)
def test_refusals_name_file_and_line(path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        chosen(path, *lines)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused_by_name(path: Path, encoding: str) -> None:
    path.write_bytes("N,D,L,note\n1,2,3,für\n".encode(encoding))
    with pytest.raises(ValueError, match=r"runs\.csv: not UTF-8 text .*; save it as CSV in UTF-8"):
        read_table(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv: No such file or directory; expected a CSV file, one run per row"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"Is a directory; expected a CSV file"):
        read_table(tmp_path)


# ---- rows that are used


@pytest.mark.parametrize("status", ["failed", "crashed", "Killed", "OOM", "timeout"])
def test_a_status_that_is_not_done_is_dropped(path: Path, status: str) -> None:
    done = ["done", "Finished", "COMPLETED", "ok", ""]
    found = chosen(path, f"{HEAD},Status", *(f"1,2,3.{i},{word}" for i, word in enumerate([*done, status])))
    assert len(found.points) == len(done)
    assert [(d.place, d.why) for d in found.dropped] == [("runs.csv, line 7", f"the run is {status}")]


def test_a_column_state_is_a_status_only_by_its_words(path: Path) -> None:
    found = chosen(path, f"{HEAD},State", "1,2,3,finished", "1,2,4,crashed", "1,2,5,4096", "1,2,6,Ohio")
    assert [d.why for d in found.dropped] == ["the run is crashed"]


def test_rows_given_twice_are_told_and_seeds_are_not(path: Path) -> None:
    found = chosen(path, HEAD, *ROWS, "1e8,1e9,3.51", ROWS[1], ROWS[0], ROWS[1])
    assert len(found.points) == 7
    (warning,) = found.warnings
    assert "runs.csv, line 6, as runs.csv, line 3; runs.csv, line 7, as runs.csv, line 2; runs.csv, line 8" in warning
    assert "remove all but one" in warning
    assert not chosen(path, HEAD, *ROWS, "1e8,1e9,3.51").warnings


def test_kinds_that_are_none_of_ours_are_rows_as_others(path: Path) -> None:
    lines = [f"{row},{kind}" for row, kind in zip(ROWS, ("dense", "moe", ""), strict=True)]
    assert len(of_kind(table(path, f"{HEAD},kind", *lines), "isoflop")) == 3
    mixed = table(path, f"{HEAD},kind", *lines, "1,2,3,state", "1,2,3,isoflop", "1,2,3,overtrained")
    assert len(of_kind(mixed, "isoflop")) == 4
    with pytest.raises(ValueError, match=r"runs\.csv: no rows of kind isoflop: all are state"):
        of_kind(table(path, f"{HEAD},kind", "1,2,3,state"), "isoflop")


def test_cuts(path: Path) -> None:
    found = chosen(path, HEAD, *ROWS, "1e8,1e9,10", cut=Cut(highest=1, above=5))
    assert found.points.loss.tolist() == [3.2, 3.0]
    assert [d.why for d in found.dropped] == ["the loss is 3.5: among the 1 highest", "the loss is 10: above --max-loss 5"]
    with pytest.raises(ValueError, match="--max-loss: 0; expected a positive number of nats"):
        Cut(above=0)


def test_groups_are_in_order_and_keep_their_lines(path: Path) -> None:
    found = dict(by_group(table(path, f"{HEAD},g", "1,2,3,b", "1,2,3,a", "1,2,4,b"), "g"))
    assert list(found) == ["b", "a"]
    assert [found["b"].place(row) for row in (0, 1)] == ["runs.csv, line 2", "runs.csv, line 4"]


def test_a_large_table_is_told_shortly(path: Path) -> None:
    """Every row is far from 6 N D; ten are named."""
    found = chosen(path, "N,D,L,flops", *(f"1e8,{1e9 + i},3,1" for i in range(30)))
    assert len(found.warnings) == 11
    assert found.warnings[-1] == "and 20 more rows like these"
    assert np.isfinite(found.flops).all()
