"""The results of a folder: one SQLite file, `results.sqlite`, with one row per run.

A run is written when it is planned, when it starts and when it ends, each in a transaction; so whatever kills the process,
runs that ended are kept, and one that was under way is done again. Readable with any SQLite client, while a sweep writes
too.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from madkernels.runs.engines import Run
from madkernels.runs.lock import is_locked, lock

SCHEMA = 2  # PRAGMA user_version; a change of the table is another number
FILE = "results.sqlite"
OPEN = ("planned", "running", "stopped")  # the statuses of a row without a result

COLUMNS = ["key", "config", "status", "metrics", "curve", "error", "started", "ended"]
_TABLE = """
CREATE TABLE runs (
    key TEXT PRIMARY KEY,  -- hash of config
    config TEXT NOT NULL,  -- JSON: version, arch, and all else that the result depends on
    status TEXT NOT NULL CHECK (status IN ('planned', 'running', 'done', 'failed')),
    metrics TEXT,          -- JSON, of a run that is done
    curve TEXT,            -- JSON, its points
    error TEXT,            -- of a run that failed
    started REAL,          -- seconds since 1970
    ended REAL
)
"""


class Results:
    """The results of a folder, to be read.

    Raises:
        ValueError: there are none, or the file is of another version or no results file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        if not self.path.exists():
            raise ValueError(f"there are no results in {folder}: {FILE} is missing")
        self.connect()

    def connect(self) -> None:
        try:
            self.db = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            with self.readable():
                self.open()
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot open {self.path}: {error}; choose another --out") from None

    @contextmanager
    def readable(self) -> Iterator[None]:
        """ValueError for a file that is damaged, wherever in it that shows."""
        try:
            yield
        except sqlite3.OperationalError:  # a lock, the disk, a right
            raise
        except sqlite3.DatabaseError as error:
            raise self.damaged(str(error)) from None

    def damaged(self, how: str) -> ValueError:
        advice = "move it away and its runs are done again, or choose another --out"
        return ValueError(f"{self.path} is damaged or no results file ({how}); {advice}")

    def open(self) -> None:
        (found,) = self.db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise self.damaged(" ".join(found.split()))
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        columns = [row[1] for row in self.db.execute("PRAGMA table_info(runs)")]
        if columns and version != SCHEMA:
            raise ValueError(
                f"{self.path} is of version {version}, this madkernels writes version {SCHEMA}; choose another --out"
            )
        if columns != COLUMNS:
            raise self.damaged(f"its table of runs has the columns {', '.join(columns)}" if columns else "it has no runs")

    def metrics(self) -> dict[str, dict[str, Any]]:
        """The metrics of the runs that are done, by key."""
        with self.readable():
            rows = self.db.execute("SELECT key, metrics FROM runs WHERE status = 'done'").fetchall()
        return {key: self._json(key, metrics) for key, metrics in rows}

    def _json(self, key: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, TypeError) as error:
            raise self.damaged(f"run {key[:16]}: {error}") from None

    def rows(self) -> list[dict[str, Any]]:
        """All runs, in the order in which they were planned, JSON read. Those that no living process runs any more are
        `stopped`, not `running`."""
        with self.readable():
            rows = self.db.execute("SELECT * FROM runs ORDER BY rowid").fetchall()
        found = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        running = "running" if is_locked(self.path) else "stopped"
        for row in found:
            row |= {k: self._json(row["key"], row[k]) for k in ("config", "metrics", "curve") if row[k] is not None}
            row["status"] = running if row["status"] == "running" else row["status"]
        return found

    def latest(self, run_of: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
        """The rows of the version of the code that the last run is of, each with its `run`, made from its configuration."""
        rows = self.rows()
        last = max(rows, key=lambda row: (row["ended"] or 0, row["started"] or 0), default=None)
        try:
            chosen = [row for row in rows if last and row["config"]["version"] == last["config"]["version"]]
            return [row | {"run": run_of(row["config"])} for row in chosen]
        except (KeyError, TypeError, AttributeError) as error:
            raise self.damaged(f"the configuration of a run cannot be read: {type(error).__name__}: {error}") from None

    def close(self) -> None:
        self.db.close()


class Store(Results):
    """Opens or makes the results of a folder, for one writer at a time.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the file is of another version, is no results file, or another process is writing to it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.lock = lock(self.path)
        self.connect()

    def open(self) -> None:
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        (tables,) = self.db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # a file that is new, or is empty
        if tables == 0 and version == 0:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.execute(_TABLE)
            self.db.execute(f"PRAGMA user_version = {SCHEMA}")
            self.db.execute("COMMIT")
        super().open()

    def plan(self, runs: Sequence[Run]) -> None:
        """Notes what is to be done; what is known already stays as it is. What an earlier process was at is to be done."""
        self._write("BEGIN IMMEDIATE", ())
        try:
            self._write("UPDATE runs SET status = 'planned' WHERE status = 'running'", ())
            for run in runs:
                self._write("INSERT OR IGNORE INTO runs (key, config, status) VALUES (?, ?, 'planned')", _named(run))
        finally:
            self._write("COMMIT", ())

    def start(self, run: Run) -> None:
        """Notes that a run is under way, or is again."""
        self._write(
            "INSERT INTO runs (key, config, status, started) VALUES (?1, ?2, 'running', ?3)"
            " ON CONFLICT (key) DO UPDATE SET status = 'running', error = NULL, started = ?3, ended = NULL",
            (*_named(run), time.time()),
        )

    def finish(self, run: Run, result: dict[str, Any]) -> None:
        """Keeps the result of a run."""
        metrics = {k: v for k, v in result.items() if k != "curve"}
        self._end(run, "done", json.dumps(metrics), json.dumps(result["curve"]), None)

    def fail(self, run: Run, error: str) -> None:
        """Keeps that a run failed; it is tried again when asked for again."""
        self._end(run, "failed", None, None, error)

    def _end(self, run: Run, status: str, metrics: str | None, curve: str | None, error: str | None) -> None:
        """Whether its start could be written or not."""
        self._write(
            "INSERT INTO runs VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7) ON CONFLICT (key) DO UPDATE SET"
            " status = ?3, metrics = ?4, curve = ?5, error = ?6, ended = ?7",
            (*_named(run), status, metrics, curve, error, time.time()),
        )

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        """One statement; outside of a plan one transaction."""
        try:
            with self.readable():
                self.db.execute(statement, values)
        except sqlite3.OperationalError as error:  # the disk is full, or the file has become read-only
            raise OSError(f"cannot write to {self.path}: {error}") from None

    def close(self) -> None:
        super().close()
        self.lock.close()


def _named(run: Run) -> tuple[str, str]:
    return run.key(), json.dumps(run.config(), sort_keys=True)
