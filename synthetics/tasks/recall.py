"""In-context recall: give the value that a key had before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from madkernels.synthetics.draws import Draws, Flags, Integers, Reals
from madkernels.synthetics.tasks.base import Split, Task, next_tokens


@dataclass(frozen=True)
class Recall(Task):
    """Pairs of a key and its value, in a map that is fresh for each sequence; the last key has occurred before.

    Keys are the lower half of the content tokens, values the upper. Validation and test score the values of keys that have
    occurred before and the last value; training scores every next token.
    """

    name: ClassVar[str] = "recall"
    summary: ClassVar[str] = "recall the value that each repeated key had before"

    def __post_init__(self) -> None:
        self.require(self.seqlen >= 4 and self.seqlen % 2 == 0, f"seqlen {self.seqlen}: it takes an even one from 4")
        self.require(self.keys >= 1, f"vocab_size {self.vocab_size} is too small: it takes {self.smallest} at least")

    @property
    def content(self) -> int:
        return self.vocab_size

    @property
    def smallest(self) -> int:
        return 2 + self.vocab_size - self.content

    @property
    def keys(self) -> int:
        return self.content // 2

    @property
    def length(self) -> int:
        return self.seqlen - 1

    def roles(self) -> dict[str, range]:
        return {"key": range(self.keys), "value": range(self.keys, self.content)}

    def make(self, draws: Draws, seed: int, split: Split) -> tuple[Integers, Integers]:
        pairs = self.seqlen // 2
        keys = draws.below(self.keys, pairs)
        values_of = self.keys + draws.below(self.content - self.keys, self.keys)  # (count, keys): the map
        noise = self.noise(draws, pairs)
        first = first_occurrences(keys[:, :-1], None if noise is None else noise[:, :-1], self.keys)
        keys[:, -1] = pick_one(first < pairs, draws.uniform())
        values = np.take_along_axis(values_of, keys, axis=1)
        sequence = self.lay_out(draws, keys, values, noise)
        if split == "train":
            return next_tokens(sequence, None)
        marks = np.zeros_like(sequence, dtype=bool)
        marks[:, 1::2] = np.take_along_axis(first, keys, axis=1) < np.arange(pairs)
        if noise is not None:
            marks[:, 1::2] &= ~noise
        return next_tokens(sequence, marks)

    def noise(self, draws: Draws, pairs: int) -> Flags | None:
        """Which pairs are noise, (count, pairs) bool, if any may be."""
        return None

    def lay_out(self, draws: Draws, keys: Integers, values: Integers, noise: Flags | None) -> Integers:
        return np.stack([keys, values], axis=-1).reshape(len(keys), -1)


def first_occurrences(keys: Integers, absent: Flags | None, choices: int) -> Integers:
    """The first place of each key, (count, choices); one more than the last place for keys that never come."""
    count, pairs = keys.shape
    first = np.full(count * choices, pairs + 1, dtype=np.int64)
    entry = (keys + choices * np.arange(count)[:, None])[:, ::-1]
    place = np.broadcast_to(np.arange(pairs - 1, -1, -1, dtype=np.int64), entry.shape)
    if absent is None:
        first[entry] = place  # of an entry that is assigned twice the last assignment stays: the earliest place
    else:
        present = ~absent[:, ::-1]
        first[entry[present]] = place[present]
    return first.reshape(count, choices)


def pick_one(among: Flags, uniform: Reals) -> Integers:
    """The number of one true entry of each row, all alike."""
    rank = np.cumsum(among, axis=1)
    chosen = (uniform * rank[:, -1]).astype(np.int64) + 1
    place: Integers = np.argmax(rank >= chosen[:, None], axis=1)
    return place
