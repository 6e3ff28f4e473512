"""The hash by which files are known again."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256, as `sha256sum` gives it. OSError where the file cannot be read."""
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
