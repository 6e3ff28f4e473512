"""Text on disk as tokens, and the batches that training takes from it.

`prepare` turns files into shards, memory-mapped arrays of tokens in which every document ends with the end token, beside a
manifest. A document is a file, or a line of a `.jsonl` file. It goes to the training or to the validation split by the hash
of its bytes, so copies of one document never lie on both sides, and what is held out does not depend on paths or order.

`Batches` reads a split as windows of `seqlen` tokens, each window once an epoch, in an order that a keyed permutation gives
without a table. The batch of a step is a function of the step alone: a run resumes at any step, on any number of ranks.
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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**28
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

Tokens = NDArray[np.unsignedinteger[Any]]


# ---- tokenizers


class Tokenizer(Protocol):
    """Text to tokens; `end` is the token that ends a document."""

    name: str
    vocab_size: int
    end: int

    def encode(self, text: bytes) -> Sequence[int] | Tokens: ...


class Bytes:
    """A token a byte, and 256 to end a document."""

    name, vocab_size, end = "bytes", 257, 256

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, np.uint8)


class HuggingFace:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library. ValueError where it has none of the known end tokens."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Model
        except ImportError:
            raise ValueError("a tokenizer file needs the tokenizers library: pip install 'madkernels[hf]'") from None
        try:
            text = path.read_bytes()
            self.model = Model.from_str(text.decode())
        except OSError as error:
            raise ValueError(f"tokenizer {path}: {error.strerror}; expected bytes, or a tokenizer.json") from None
        except Exception as error:  # what the library raises for a file that is none
            raise ValueError(f"tokenizer {path}: {error}") from None
        self.name = f"{path.name} sha256:{hashlib.sha256(text).hexdigest()}"
        self.vocab_size = self.model.get_vocab_size()
        ends = [self.model.token_to_id(name) for name in END_NAMES]
        found = next((end for end in ends if end is not None), None)
        if found is None:
            raise ValueError(f"tokenizer {path} has no token that ends a document; looked for {', '.join(END_NAMES)}")
        self.end: int = found

    def encode(self, text: bytes) -> list[int]:
        ids: list[int] = self.model.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        return ids


def tokenizer_of(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json."""
    return Bytes() if name == "bytes" else HuggingFace(Path(name))


# ---- documents


def standard_library() -> list[Path]:
    """The source of Python's standard library without its tests: about 12 MB of text that is there wherever Python is."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))


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
    """The text of each file; of a .jsonl file the `text` of each line."""
    for path in files:
        if path.suffix != ".jsonl":
            yield path.read_bytes()
            continue
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["text"].encode()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f"{path}, line {number}: expected a JSON object with a string 'text'") from None


def dataset_documents(name: str, column: str = "text") -> Iterator[bytes]:
    """The rows of the `train` split of a Hugging Face dataset, by its name or folder.

    Raises:
        ValueError: the library is not installed, or the dataset cannot be read or has no such column.
    """
    try:
        from datasets import load_dataset
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
        documents: texts; copies of one that came before are left out, and so are empty ones.
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
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        manifest = _write(documents, unfinished, tokenizer, validation, shard_tokens)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        unfinished.rename(out)
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
    digests = [shard["sha256"] for split in SPLITS for shard in shards[split]]
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "end": tokenizer.end,
        "dtype": np.dtype(dtype).name,
        "documents": len(seen),
        "left_out": copies,
        "splits": shards,
        "sha256": hashlib.sha256(json.dumps([FORMAT, tokenizer.name, *digests]).encode()).hexdigest(),
    }


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


# ---- reading


class Split:
    """The tokens of one split, over its shards: `split[start:stop]`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], name: str) -> None:
        self.shards = [
            np.memmap(folder / shard["file"], np.dtype(manifest["dtype"]).newbyteorder("<"), "r")
            for shard in manifest["splits"][name]
        ]
        self.ends = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, span: slice) -> Tokens:
        first = int(np.searchsorted(self.ends, span.start, "right")) - 1
        last = int(np.searchsorted(self.ends, span.stop, "left")) - 1
        parts = [
            self.shards[i][max(span.start - self.ends[i], 0) : span.stop - self.ends[i]] for i in range(first, last + 1)
        ]
        return np.concatenate(parts)


class Corpus:
    """A folder that `prepare` made.

    Raises:
        ValueError: it is none, is of another format, or its shards are not as long as the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no prepared data; make it with: madkernels train prepare") from None
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{folder} is of format {self.manifest.get('format')}; this madkernels reads format {FORMAT}")
        width = np.dtype(self.manifest["dtype"]).itemsize
        for shard in (shard for split in SPLITS for shard in self.manifest["splits"][split]):
            path = folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["tokens"] * width:
                raise ValueError(f"{path} is not the shard of {shard['tokens']} tokens that the manifest tells of")
        self.vocab_size: int = self.manifest["vocab_size"]
        self.end: int = self.manifest["end"]
        self.sha256: str = self.manifest["sha256"]
        self.splits = {name: Split(folder, self.manifest, name) for name in SPLITS if self.manifest["splits"][name]}

    def split(self, name: str) -> Split:
        """ValueError where nothing was held out."""
        if name not in self.splits:
            raise ValueError(f"this data has no {name} split; prepare it with a validation share above 0")
        return self.splits[name]


class Batch(NamedTuple):
    """Rows of a batch: what is read, what is to be told, and where documents begin.

    tokens, targets: (rows, seqlen) int64. cu_seqlens: (num_docs + 1,) int32, offsets of the documents, or parts of them,
    along the rows laid end to end; a row begins a document.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor

    def part(self, start: int, stop: int, end: int) -> Batch:
        """Rows start to stop, of a corpus whose documents end with `end`."""
        tokens = self.tokens[start:stop]
        return Batch(tokens, self.targets[start:stop], _offsets(tokens, end))


class Batches:
    """The batches of a training, by step.

    Args:
        split: where they come from.
        end: the token that ends a document.
        batch: rows.
        seqlen: tokens a row.
        seed: of the order.

    Raises:
        ValueError: the split has not one batch.
    """

    def __init__(self, split: Split, end: int, *, batch: int, seqlen: int, seed: int) -> None:
        self.windows = (len(split) - 1) // seqlen - 1  # one less, so that they can be shifted
        if self.windows < batch:
            raise ValueError(
                f"a batch of {batch} rows of {seqlen} tokens needs {(batch + 1) * seqlen + 1} tokens; there are {len(split)}"
            )
        self.split, self.end, self.batch, self.seqlen, self.seed = split, end, batch, seqlen, seed

    @property
    def tokens(self) -> int:
        """Of an epoch."""
        return self.windows * self.seqlen

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        rows = np.stack([self._window(step * self.batch + row) for row in range(self.batch)])
        both = torch.from_numpy(rows.astype(np.int64))
        tokens = both[:, :-1].contiguous()
        return Batch(tokens, both[:, 1:].contiguous(), _offsets(tokens, self.end))

    def _window(self, number: int) -> Tokens:
        """(seqlen + 1,): where windows begin is shifted from epoch to epoch."""
        epoch, place = divmod(number, self.windows)
        shift = _mix(self.seed, epoch) % self.seqlen
        start = shift + permuted(place, self.windows, _mix(self.seed, epoch + 2**32)) * self.seqlen
        return self.split[start : start + self.seqlen + 1]


def _offsets(tokens: Tensor, end: int) -> Tensor:
    """Documents begin at the first place of each row, and after each end token."""
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == end
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([tokens.numel()])]).to(torch.int32)


def permuted(place: int, count: int, key: int) -> int:
    """Where a keyed permutation of 0..count-1 sends a place: a Feistel network over the next power of four, walked until it
    lands inside (Black and Rogaway 2002)."""
    half = max(1, -(-(count - 1).bit_length() // 2))
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key, right * 4 + turn) & mask)
        place = left << half | right
        if place < count:
            return place


def _mix(key: int, value: int) -> int:
    """64 bits that look random (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = (key * 0x9E3779B97F4A7C15 + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ z >> 31


def held_out(split: Split, seqlen: int, most: int) -> Tensor:
    """What losses are measured on: windows of the validation split, evenly over it, at most so many.

    Returns:
        (windows, seqlen + 1) int64.

    Raises:
        ValueError: there is not one window.
    """
    windows = (len(split) - 1) // seqlen
    if windows < 1:
        raise ValueError(f"the validation split has {len(split)} tokens; one row needs {seqlen + 1}")
    starts = np.linspace(0, windows - 1, min(windows, most)).astype(int) * seqlen
    return torch.from_numpy(np.stack([split[s : s + seqlen + 1] for s in starts]).astype(np.int64))
