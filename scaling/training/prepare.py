"""Text to tokens on disk: shards, memory-mapped arrays of tokens in which every document ends with the end token, beside a
manifest.

A document is a file, or a line of a `.jsonl` file. It goes to the training or to the validation split by the hash of its
bytes, so copies of one document never lie on both sides, and what is held out does not depend on paths or order.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from madkernels.scaling.training.data import FORMAT, MANIFEST, SPLITS, Tokens, checksum, data_sha256
from madkernels.scaling.training.tokenizers import Tokenizer

SHARD_TOKENS = 2**28


# ---- documents


def standard_library() -> list[Path]:
    """The source of Python's standard library without its tests: about 12 MB of text that is there wherever Python is."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def files_of(patterns: Sequence[str]) -> list[Path]:
    """Files, and those that glob patterns (with ** for any depth) match, in the order of their names."""
    found: set[Path] = set()
    for pattern in patterns:
        matched = [path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file()]
        if not matched:
            raise ValueError(f"no file matches {pattern}")
        found.update(matched)
    return sorted(found)


def documents_of(files: Sequence[Path]) -> Iterator[bytes]:
    """The text of each file; of a .jsonl file the `text` of each line that is not blank.

    Raises:
        ValueError: a file cannot be read, is not UTF-8, or has a line that is not such an object.
    """
    for path in files:
        try:
            if path.suffix == ".jsonl":
                yield from _lines_of(path)
            else:
                yield _utf8(path.read_bytes(), path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _lines_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            _utf8(line, path, number)
            try:
                yield json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(f"{path}, line {number}: expected a JSON object with a string 'text'") from None


def _utf8(text: bytes, path: Path, first: int = 1) -> bytes:
    """The same. ValueError with the line where it is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        line = first + text.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: not UTF-8 (0x{text[error.start]:02x}); convert the file first") from None
    return text


def dataset_documents(name: str, column: str = "text") -> Iterator[bytes]:
    """The rows of the `train` split of a Hugging Face dataset, by its name or folder.

    Raises:
        ValueError: the library is not installed, or the dataset cannot be read or has no such column.
    """
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise ValueError("a dataset needs the datasets library: pip install 'madkernels[hf]'") from None
    try:
        for row in load_dataset(name, split="train", streaming=True):
            if column not in row:
                raise ValueError(f"it has no column {column!r}; it has {', '.join(row)}")
            yield row[column].encode()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset {name}: {error}") from None


# ---- writing


def prepare(
    documents: Iterator[bytes],
    out: Path,
    tokenizer: Tokenizer,
    *,
    validation: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Writes shards and manifest, all or nothing.

    Args:
        documents: texts; copies of one that came before are dropped, and so are empty ones.
        out: a folder that is not there yet.
        validation: share of the documents that is held out, from 0 up to but not including 1.
        shard_tokens: how many tokens a shard takes before the next is begun.

    Returns:
        The manifest.

    Raises:
        ValueError: `out` is there already, `validation` is no such share, or there is no document for a split.
        OSError: `out` cannot be written.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation is {validation}; expected a share from 0 and below 1")
    if out.exists():
        raise ValueError(f"{out} is there already; choose another --out")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        manifest = _write(documents, unfinished, tokenizer, validation, shard_tokens)
        tokenizer.save(unfinished)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        unfinished.rename(out)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def _write(
    documents: Iterator[bytes], folder: Path, tokenizer: Tokenizer, validation: float, shard_tokens: int
) -> dict[str, Any]:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    writers = {split: _Writer(folder, split, np.dtype(dtype), shard_tokens) for split in SPLITS}
    seen, copies = set[bytes](), 0
    for text in documents:
        digest = hashlib.sha256(text).digest()
        if not text or digest in seen:
            copies += 1
            continue
        seen.add(digest)
        held_out = int.from_bytes(digest[:8], "big") < validation * 2**64
        writers["validation" if held_out else "train"].add(
            np.append(np.asarray(tokenizer.encode(text), dtype), tokenizer.end)
        )
    shards = {split: writer.close() for split, writer in writers.items()}
    if not shards["train"] or (validation > 0 and not shards["validation"]):
        raise ValueError(f"{len(seen)} documents do not make both splits: give more text, or another validation share")
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "end": tokenizer.end,
        "dtype": np.dtype(dtype).name,
        "documents": len(seen),
        "left_out": copies,
        "splits": shards,
    }
    manifest["sha256"] = data_sha256(manifest)
    return manifest | {"checksum": checksum(manifest)}


class _Writer:
    """The shards of one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.file: Any = None

    def add(self, document: Tokens) -> None:
        """A document lies in one shard as a whole."""
        if self.file is None:
            self.shards.append({"file": f"{self.split}-{len(self.shards):05d}.bin", "tokens": 0, "documents": 0})
            self.file, self.digest = (self.folder / self.shards[-1]["file"]).open("wb"), hashlib.sha256()
        data = document.astype(self.dtype.newbyteorder("<")).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.shards[-1]["tokens"] += len(document)
        self.shards[-1]["documents"] += 1
        if self.shards[-1]["tokens"] >= self.shard_tokens:
            self.end_shard()

    def end_shard(self) -> None:
        self.file.close()
        self.file = None
        self.shards[-1]["sha256"] = self.digest.hexdigest()

    def close(self) -> list[dict[str, Any]]:
        if self.file is not None:
            self.end_shard()
        return self.shards
