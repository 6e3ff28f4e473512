"""One writer to a folder at a time."""

from __future__ import annotations

import fcntl
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
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise ValueError(f"another process is writing to {path}; wait for it or choose another --out") from None
    return held
