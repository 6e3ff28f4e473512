"""Results files that are damaged: one line that names the file and what to do, whichever command meets it."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from madkernels.cli.main import main
from madkernels.runs.store import FILE, Results, Store
from madkernels.synthetics.protocol import plan

COMMANDS = ("run", "status", "compare", "report", "search")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of several pages, with runs that are done."""
    store = Store(tmp_path)
    runs = plan("demo", ["mlp", "2*mlp"])
    store.plan(runs)
    for run in runs:
        curve = [{"loss": 1.0, "held_out_accuracy": 0.5}] * 50
        store.finish(run, {"accuracy": 0.5, "held_out_accuracy": 0.5, "seconds": 1.0, "curve": curve})
    store.close()
    return tmp_path / FILE


def overwrite(start: float, end: float) -> Callable[[Path], None]:
    """Bytes of the file, in parts of it."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        first, last = int(start * len(content)), int(end * len(content))
        content[first:last] = b"\xa5" * (last - first)
        file.write_bytes(content)

    return damage


def sql(statement: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with sqlite3.connect(file) as db:
            db.execute(statement)
        db.close()

    return damage


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first page": overwrite(0, 0.02),
    "header": lambda file: file.write_bytes(file.read_bytes()[:20] + b"\xa5" * 60 + file.read_bytes()[80:]),
    "later pages": overwrite(0.3, 0.9),
    "last page": overwrite(0.95, 1),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 + 100]),
    "almost empty": lambda file: file.write_bytes(file.read_bytes()[:60]),
    "text": lambda file: file.write_text("precious text, " * 100),
    "folder": folder,
    "no table": sql("DROP TABLE runs"),
    "other columns": sql("ALTER TABLE runs RENAME COLUMN metrics TO figures"),
    "more columns": sql("ALTER TABLE runs ADD COLUMN more"),
    "no JSON": sql("UPDATE runs SET metrics = '{' WHERE rowid = 3"),
    "no JSON in a configuration": sql("UPDATE runs SET config = 'x' WHERE rowid = 3"),
    "half a configuration": sql("UPDATE runs SET config = '{\"version\": 1}'"),
    "another version": sql("PRAGMA user_version = 7"),
}
READERS = ("status", "compare", "report")
LATE = ("no JSON in a configuration", "half a configuration")  # what runs reads no configuration before it trains


@pytest.mark.parametrize(("name", "command"), [(n, c) for n in DAMAGES for c in COMMANDS if c in READERS or n not in LATE])
def test_is_one_line(
    name: str, command: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[name](file)
    before = None if file.is_dir() else file.read_bytes()
    monkeypatch.setattr(sys, "argv", ["madkernels", "mad", command, "--out", str(file.parent)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2, told
    assert len(told) == 1
    assert str(file) in told[0]
    assert "choose another --out" in told[0]
    assert before is None or file.read_bytes() == before


def test_an_empty_file_is_a_new_one_for_a_writer(file: Path) -> None:
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"results\.sqlite is damaged or no results file \(it has no runs\)"):
        Results(file.parent)
    Store(file.parent).close()
    assert Results(file.parent).rows() == []


def test_files_that_sqlite_left_do_no_harm(file: Path) -> None:
    for kind in ("wal", "shm", "journal"):
        (file.parent / f"{FILE}-{kind}").write_bytes(b"left " * 1000)
    store = Store(file.parent)
    assert len(store.rows()) == 12
    store.close()


def test_a_task_that_is_not_here_is_named(file: Path) -> None:
    from madkernels.synthetics.protocol import Run

    with sqlite3.connect(file) as db:
        ((config,),) = db.execute("SELECT config FROM runs LIMIT 1")
        other = json.loads(config)
        other["task"]["name"] = "recal"
        db.execute("UPDATE runs SET config = ? WHERE rowid = 1", (json.dumps(other),))
    db.close()
    with pytest.raises(
        ValueError, match=r"unknown task 'recal'; there are .*; did you mean recall\?; one from outside needs its"
    ):
        Results(file.parent).latest(Run.of)
