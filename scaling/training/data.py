"""Prepared tokens, and the batches that training takes from them.

`Batches` reads a split as windows of `seqlen` tokens, each window once per epoch, in an order that a keyed permutation gives
without a table. The batch of a step is a function of the step alone: a run resumes at any step, on any number of ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from madkernels.scaling.training.digest import file_sha256

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")
AGAIN = "prepare the data again"

Tokens = NDArray[np.unsignedinteger[Any]]


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
        ValueError: it is none, is of another format, its manifest is damaged, or its shards are not as long as that says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, _manifest_of(folder)
        width = np.dtype(self.manifest["dtype"]).itemsize
        for shard in self.shards():
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["tokens"] * width:
                raise ValueError(f"{path} is not the shard of {shard['tokens']} tokens that the manifest tells of; {AGAIN}")
        self.vocab_size: int = self.manifest["vocab_size"]
        self.end: int = self.manifest["end"]
        self.sha256: str = self.manifest["sha256"]
        self.splits = {name: Split(folder, self.manifest, name) for name in SPLITS if self.manifest["splits"][name]}

    def shards(self) -> list[dict[str, Any]]:
        return [shard for split in SPLITS for shard in self.manifest["splits"][split]]

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Reads every `ranks`-th shard, and compares it with its hash in the manifest. A process reads a shard once, as long
        as nobody has written to it since.

        Raises:
            ValueError: a shard holds other tokens than were written.
        """
        for shard in self.shards()[rank::ranks]:
            path = self.folder / shard["file"]
            found = path.stat()
            if _sha256_of(path, found.st_mtime_ns, found.st_ino) != shard["sha256"]:
                raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; {AGAIN}")

    def split(self, name: str) -> Split:
        """ValueError where nothing was held out."""
        if name not in self.splits:
            raise ValueError(f"this data has no {name} split; prepare it with a validation share above 0")
        return self.splits[name]


@cache
def _sha256_of(path: Path, changed: int, inode: int) -> str:
    return file_sha256(path)


def checksum(manifest: dict[str, Any]) -> str:
    """A hash of all that a manifest says."""
    said = {name: value for name, value in manifest.items() if name != "checksum"}
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def data_sha256(manifest: dict[str, Any]) -> str:
    """What makes the data those and no others: the tokenizer, and the hashes of the shards."""
    digests = [shard["sha256"] for split in SPLITS for shard in manifest["splits"][split]]
    return sha256(json.dumps([FORMAT, manifest["tokenizer"], *digests]).encode()).hexdigest()


def _manifest_of(folder: Path) -> dict[str, Any]:
    """ValueError where it is none, or cannot have been written so."""
    path = folder / MANIFEST
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no prepared data; make it with: madkernels train prepare") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is no JSON; {AGAIN}") from None
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} is of format {manifest.get('format')}; this madkernels reads format {FORMAT}")
    try:
        usable = _is_usable(manifest)
    except (KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise ValueError(f"{path} is damaged: it does not say what prepare writes; {AGAIN}")
    return dict(manifest)


def _is_usable(manifest: Any) -> bool:
    """Those that were written before there was a checksum have none."""
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]]
    return (
        manifest.get("checksum", checksum(manifest)) == checksum(manifest)
        and manifest["dtype"] in ("uint16", "uint32")
        and 0 <= manifest["end"] < manifest["vocab_size"]
        and all(Path(shard["file"]).name == shard["file"] and shard["tokens"] > 0 for shard in shards)
        and manifest["sha256"] == data_sha256(manifest)
    )


@dataclass(frozen=True)
class Batch:
    """Rows of a batch: what is read, and what is to be predicted.

    tokens, targets: (rows, seqlen) int64. end: the token that ends a document.
    """

    tokens: Tensor
    targets: Tensor
    end: int

    @property
    def cu_seqlens(self) -> Tensor:
        """(num_docs + 1,) int32, offsets of the documents, or parts of them, along the rows laid end to end: documents begin
        at the first place of each row, and after each end token."""
        begins = torch.ones_like(self.tokens, dtype=torch.bool)
        begins[:, 1:] = self.tokens[:, :-1] == self.end
        starts = begins.flatten().nonzero().flatten()
        return torch.cat([starts, starts.new_tensor([self.tokens.numel()])]).to(torch.int32)

    def part(self, start: int, stop: int) -> Batch:
        """Rows start to stop."""
        return Batch(self.tokens[start:stop], self.targets[start:stop], self.end)


class Batches:
    """The batches of a training, by step.

    Args:
        split: where they come from.
        end: the token that ends a document.
        batch: rows.
        seqlen: tokens per row.
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
        """Tokens that are read in one epoch."""
        return self.windows * self.seqlen

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        rows = np.stack([self._window(step * self.batch + row) for row in range(self.batch)])
        both = torch.from_numpy(rows.astype(np.int64))
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous(), self.end)

    def _window(self, number: int) -> Tokens:
        """(seqlen + 1,): where windows begin is shifted from epoch to epoch."""
        epoch, place = divmod(number, self.windows)
        shift = _mix(self.seed, epoch) % self.seqlen
        start = shift + permuted(place, self.windows, _mix(self.seed, epoch + 2**32)) * self.seqlen
        return self.split[start : start + self.seqlen + 1]


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
