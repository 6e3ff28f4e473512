"""The results of a folder: one SQLite file, `results.sqlite`, with a row a run.

A run is written when it starts and when it ends, each in a transaction; so whatever kills the process, runs that ended are
kept, and one that was under way is done again. Readable with any SQLite client.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from madkernels.synthetics.protocol import Run

SCHEMA = 1  # PRAGMA user_version; a change of the table is another number
FILE = "results.sqlite"

_TABLE = """
CREATE TABLE runs (
    key TEXT PRIMARY KEY,  -- hash of config
    config TEXT NOT NULL,  -- JSON: version, arch, task, training
    status TEXT NOT NULL CHECK (status IN ('running', 'done', 'failed')),
    metrics TEXT,          -- JSON, of a run that is done
    curve TEXT,            -- JSON, a point an epoch
    error TEXT,            -- of a run that failed
    started REAL NOT NULL, -- seconds since 1970
    ended REAL
)
"""


class Store:
    """Opens or makes the results of a folder, for one writer at a time.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the file is of another version, is no results file, or another process is writing to it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / f"{FILE}.lock", "w")  # noqa: SIM115  (held until close)
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {self.path}; wait for it or choose another --out") from None
        try:
            self.db = sqlite3.connect(self.path, isolation_level=None)
            self._open()
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot open {self.path}: {error}; choose another --out") from None
        except sqlite3.DatabaseError:
            raise ValueError(f"{self.path} is no results file; choose another --out") from None

    def _open(self) -> None:
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        (tables,) = self.db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0 and version == 0:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.execute(_TABLE)
            self.db.execute(f"PRAGMA user_version = {SCHEMA}")
            self.db.execute("COMMIT")
        elif version != SCHEMA:
            raise ValueError(
                f"{self.path} is of version {version}, this madkernels writes version {SCHEMA}; choose another --out"
            )

    def metrics(self) -> dict[str, dict[str, Any]]:
        """The metrics of the runs that are done, by key."""
        rows = self.db.execute("SELECT key, metrics FROM runs WHERE status = 'done'")
        return {key: json.loads(metrics) for key, metrics in rows}

    def start(self, run: Run) -> None:
        """Notes that a run is under way, or is again."""
        self._write(
            "INSERT OR REPLACE INTO runs (key, config, status, started) VALUES (?, ?, 'running', ?)",
            (run.key(), json.dumps(run.config(), sort_keys=True), time.time()),
        )

    def finish(self, run: Run, result: dict[str, Any]) -> None:
        """Keeps the result of a run."""
        metrics = {k: v for k, v in result.items() if k != "curve"}
        self._write(
            "UPDATE runs SET status = 'done', metrics = ?, curve = ?, error = NULL, ended = ? WHERE key = ?",
            (json.dumps(metrics), json.dumps(result["curve"]), time.time(), run.key()),
        )

    def fail(self, run: Run, error: str) -> None:
        """Keeps that a run failed; it is tried again when asked for again."""
        self._write("UPDATE runs SET status = 'failed', error = ?, ended = ? WHERE key = ?", (error, time.time(), run.key()))

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        """One statement, which is one transaction."""
        try:
            self.db.execute(statement, values)
        except sqlite3.OperationalError as error:  # the disk is full, or the file has become read-only
            raise OSError(f"cannot write to {self.path}: {error}") from None

    def rows(self) -> list[dict[str, Any]]:
        """All runs, oldest first, JSON read."""
        cursor = self.db.execute("SELECT * FROM runs ORDER BY started")
        names = [column[0] for column in cursor.description]
        found = [dict(zip(names, row, strict=True)) for row in cursor]
        for row in found:
            row |= {k: json.loads(row[k]) for k in ("config", "metrics", "curve") if row[k] is not None}
        return found

    def close(self) -> None:
        self.db.close()
        self.lock.close()
