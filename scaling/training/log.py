"""The log of a training."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from madkernels.runs.lock import lock

FILE = "log.jsonl"

Point = dict[str, float]


class Log:
    """The points of a run, in memory, and in a folder as JSON lines and for TensorBoard where that is installed. What cannot
    be written costs a warning and no more: lines are tried again with the next one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.points, self.warnings = folder, list[Point](), list[str]()
        self.file: io.FileIO | None = None  # while it holds all points
        self.board: Any = None
        self.lock = None if folder is None else lock(folder / FILE)
        self.full = False
        self.hook = threading.excepthook

    def begin(self, points: list[Point], step: int) -> None:
        """Opens the log with the points up to a step; what was written later is dropped."""
        self.points = points
        if self.folder is None:
            return
        self.write()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        threading.excepthook = self._of_thread
        try:
            self.board = SummaryWriter(str(self.folder), purge_step=step + 1)
        except OSError as error:
            self._without_board(error)

    def add(self, step: int, values: Point) -> None:
        self.points.append({"step": step} | values)
        if self.folder is not None:
            self.write()
        try:
            for name, value in values.items() if self.board else ():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            self._without_board(error)

    def write(self) -> None:
        """The last point, or all where the file does not hold those before."""
        assert self.folder is not None
        path = self.folder / FILE
        try:
            if self.file is None:
                whole = path.with_suffix(".unfinished")
                self.file = open(whole, "wb", buffering=0)  # noqa: SIM115  (held until close)
                _write(self.file, self.points)
                whole.rename(path)
            else:
                _write(self.file, self.points[-1:])
            self.full = False
        except OSError as error:
            self._let_go_of_file()
            with suppress(OSError):
                path.with_suffix(".unfinished").unlink()
            if not self.full:
                self.warn(f"cannot write {path}: {error.strerror or error}; tried again with the next line")
            self.full = True

    def _let_go_of_file(self) -> None:
        if self.file:
            self.file.close()
        self.file = None

    def _of_thread(self, told: threading.ExceptHookArgs) -> None:
        """What TensorBoard's thread meets is raised again by the next call."""
        if type(told.thread).__name__ != "_AsyncWriterThread":
            self.hook(told)

    def _without_board(self, error: OSError) -> None:
        """Its thread is dead, so it is not closed."""
        self.warn(f"cannot write for TensorBoard to {self.folder}: {error.strerror or error}")
        self.board = None

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        say(f"warning: {text}")

    def close(self) -> None:
        if self.full:
            self.write()
        self._let_go_of_file()
        try:
            if self.board:
                self.board.close()
        except OSError as error:
            self._without_board(error)
        threading.excepthook = self.hook
        if self.lock:
            self.lock.close()


def say(line: str) -> None:
    """Prints; where the output is a file on a full disk, the training goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        return


def _write(file: io.FileIO, points: list[Point]) -> None:
    """OSError where it is not all written."""
    data = "".join(json.dumps(point) + "\n" for point in points).encode()
    if data and file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def points_of(folder: Path, step: int) -> list[Point]:
    """The points of a log up to a step; those before the first damaged line, where there is one."""
    found: list[Point] = []
    try:
        for line in (folder / FILE).read_text(encoding="utf-8").splitlines():
            point = json.loads(line)
            found += [point] if point["step"] <= step else []
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off
        pass
    return found
