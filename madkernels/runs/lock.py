"""One writer to a folder at a time."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import TextIO


def lock(path: Path) -> TextIO:
    """Holds `path` for this process, as `path.lock`, until what it returns is closed or the process ends.

    Raises:
        OSError: the folder cannot be written.
        ValueError: another process holds it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = open(f"{path}.lock", "w")  # noqa: SIM115  (held until close)
    except OSError as error:
        raise OSError(f"cannot write to {path.parent}: {error.strerror}; choose another --out") from None
    for wait in (0.1, 0.1, 0.0):  # who only looks holds it for a moment
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            time.sleep(wait)
    held.close()
    raise ValueError(f"another process is writing to {path}; wait for it or choose another --out")


def is_locked(path: Path) -> bool:
    """Whether a process, this one too, holds `path`; that of a process that has died is not held."""
    try:
        with open(f"{path}.lock") as looked_at:
            fcntl.flock(looked_at, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it cannot be read
        return False
    return False
