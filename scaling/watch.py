"""What watches over a training: which steps are to be trusted, and the log."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madkernels.runs.lock import lock

SPIKE = 20.0  # times the usual norm of the gradient
USUAL_AFTER = 50  # steps before a norm is usual


@dataclass
class Guard:
    """Leaves out a step whose loss or gradient is no number, or whose gradient is far larger than usual. What is usual
    follows those left out too, as far as they would have been let in: so that one batch is left out, and not every batch
    after the model has come to where gradients are large."""

    usual: float = 0.0  # running mean of the norm
    allowed: int = 0
    left_out: int = 0
    in_a_row: int = 0

    def allows(self, loss: float, norm: float) -> bool:
        finite = math.isfinite(loss) and math.isfinite(norm)
        most = SPIKE * self.usual if self.allowed >= USUAL_AFTER else math.inf
        good = finite and norm <= most
        if finite:
            self.usual += (min(norm, most) - self.usual) / min(self.allowed + 1, USUAL_AFTER)
        self.allowed += good
        self.left_out += not good
        self.in_a_row = 0 if good else self.in_a_row + 1
        return good


class Log:
    """The points of a run, in memory, and in a folder as JSON lines and for TensorBoard where that is installed."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.points, self.warnings = folder, list[dict[str, float]](), list[str]()
        self.file: Any = None
        self.board: Any = None
        self.lock = None if folder is None else lock(folder / "log.jsonl")

    def begin(self, step: int) -> None:
        """Opens it as it was after a step; what was written later is let go."""
        if self.folder is None:
            return
        path = self.folder / "log.jsonl"
        self.points = [point for point in _lines(path) if point["step"] <= step]
        whole = path.with_suffix(".unfinished")
        whole.write_text("".join(json.dumps(point) + "\n" for point in self.points))
        whole.rename(path)
        self.file = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(self.folder), purge_step=step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        self.points.append({"step": step} | values)
        if self.file:
            self.file.write(json.dumps(self.points[-1]) + "\n")
            self.file.flush()
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        print(f"warning: {text}", flush=True)

    def close(self) -> None:
        for writer in (self.file, self.board, self.lock):
            if writer:
                writer.close()


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """Those that were written to their end."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return
