"""Files that commands write: nothing is lost that was there before, and none is left half written."""

from __future__ import annotations

import os
from pathlib import Path


def refuse_existing(path: Path, force: bool) -> None:
    """ValueError where a file is there that may not be lost. To be called before the work that it is the result of."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file")
    if path.is_file() and not force:
        raise ValueError(f"{path} is there already; choose another name, or --force to write over it")


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name first, so that it is there as a whole or as it was. ValueError names the file."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe
            path.write_text(text, encoding="utf-8", newline="")
        else:
            _replace(path.resolve(), text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
