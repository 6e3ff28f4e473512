"""Fuzzy in-context recall: keys and values of several tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from madkernels.synthetics.draws import Draws, Flags, Integers, Reals, distinct, split_unit
from madkernels.synthetics.tasks.base import Split, Task, next_tokens


@dataclass(frozen=True)
class FuzzyRecall(Task):
    """As recall, but a key is a tuple of distinct key tokens and a value a tuple of distinct value tokens.

    Key lengths are even over 1 to `key_motif` in training, `key_motif` in validation and test; value lengths even over 1 to
    `value_motif`. A probe pair is inserted where the sequence passes a random place, unless its key came before by chance,
    and closes the sequence; a pad token (the last of the vocabulary) fills up on the left. Validation and test score the
    values of repeated keys and the last value; training scores every next token, pads included.

    As published, the probe's place may lie behind where filling stops, so that in about 2 % of sequences the last key was
    never shown: those cannot be answered, and no model reaches an accuracy of 1. With `answerable` it lies before.
    """

    name: ClassVar[str] = "fuzzy-recall"
    summary: ClassVar[str] = "recall, with keys and values of one to three tokens"

    key_motif: int = 3
    value_motif: int = 3
    answerable: bool = False

    def __post_init__(self) -> None:
        motif = self.key_motif + self.value_motif
        self.require(self.key_motif >= 1 and self.value_motif >= 1, "motifs take a length from 1")
        smallest = 1 + max(2 * self.key_motif, 2 * self.value_motif - 1)
        enough = self.keys >= self.key_motif and self.values >= self.value_motif
        self.require(enough, f"vocab_size {self.vocab_size} is too small: it takes {smallest} at least for these motifs")
        self.require(self.seqlen > 2 * motif, f"seqlen {self.seqlen} is too short: it takes {2 * motif + 1} at least")

    @property
    def keys(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def values(self) -> int:
        return self.vocab_size - 1 - self.keys

    def roles(self) -> dict[str, range]:
        pad = self.vocab_size - 1
        return {"key": range(self.keys), "value": range(self.keys, pad), "pad": range(pad, pad + 1)}

    def make(self, draws: Draws, seed: int, split: Split) -> tuple[Integers, Integers]:
        slots = self.seqlen // 2  # pairs that may be needed, the probe in front
        key_length, key = self.draw_keys(draws.uniform(slots + 1), split)
        code = self.codes(key_length, key)
        value_length, value = self.draw_values(draws.of(code))
        pair_length = key_length + value_length
        start, kept = self.place(pair_length, code, draws.uniform())

        sequence = np.full((len(code), self.seqlen + 1), self.vocab_size - 1)
        marks = np.zeros_like(sequence, dtype=bool)
        repeated = self.repeated(code, start, kept) if split != "train" else np.zeros_like(kept)
        write(sequence, start, key_length, key, kept)
        write(sequence, start + key_length, value_length, value + self.keys, kept, marks, repeated)
        # the probe once more, at the end
        end = np.full((len(code), 1), self.seqlen + 1)
        always = np.ones_like(end, dtype=bool)
        write(sequence, end - pair_length[:, :1], key_length[:, :1], key[..., :1], always)
        write(sequence, end - value_length[:, :1], value_length[:, :1], value[..., :1] + self.keys, always, marks, always)
        return next_tokens(sequence, None if split == "train" else marks)

    def draw_keys(self, uniform: Reals, split: Split) -> tuple[Integers, Integers]:
        """Lengths (count, slots) and tokens (key_motif, count, slots) of the keys."""
        length, uniform = split_unit(uniform, self.key_motif)
        length = length + 1 if split == "train" else np.full_like(length, self.key_motif)
        return length, distinct(uniform, self.keys, self.key_motif)

    def codes(self, length: Integers, key: Integers) -> Integers:
        """A number for each key, the same for the same tokens and length."""
        code = np.zeros_like(length)
        for i in range(self.key_motif):
            code = code * (self.keys + 1) + (i < length) * (key[i] + 1)
        return code

    def draw_values(self, uniform: Reals) -> tuple[Integers, Integers]:
        length, uniform = split_unit(uniform, self.value_motif)
        return length + 1, distinct(uniform, self.values, self.value_motif)

    def place(self, pair_length: Integers, code: Integers, uniform: Reals) -> tuple[Integers, Flags]:
        """Where each pair starts in the padded sequence, (count, slots + 1), the probe in front; and which are there.

        Pairs follow one another from 0. The probe goes in front of the first that starts at `passed` or later, and moves
        that one and those after it. Pairs that would start at `limit` or later are dropped; the rest is moved to the right,
        up to where the probe stands once more.

        With motifs of at most 2 and seqlen 14, so 15 tokens, a probe of length 4 and others of 4, 3 and 3, passed = 2:

        ```text
        limit = 14 - 4 - (2 + 2) = 6
        others                 0    4   7
        probe inserted         0   [4]  8  11     in front of the pair at 4, the first that starts at 2 or later
        kept: below the limit  0   [4]            they fill 8 tokens
        pad = 15 - 4 - 8 = 3   3   [7]            returned: start (7, 3, 11, 14), kept (yes, yes, no, no)

        8 8 8 | 3 0 6 5 | 0 2 5 7 | 0 2 5 7       pad, the first pair, the probe, and the probe at the end
        ```
        """
        probe, others = pair_length[:, :1], pair_length[:, 1:]
        longest = self.key_motif + self.value_motif
        limit = self.seqlen - probe - longest  # filling stops here
        places = limit - longest + 1 if self.answerable else self.seqlen - 2 * probe
        passed = (uniform[:, None] * places).astype(np.int64)  # the probe comes where this is passed
        start = np.cumsum(others, axis=1) - others
        probe_start, behind = insert_probe(start, code[:, 1:] == code[:, :1], passed, self.seqlen)
        start = np.concatenate([probe_start, start + np.where(behind, probe, 0)], axis=1)
        kept = start < limit
        filled = np.where(kept, start + pair_length, 0).max(axis=1, keepdims=True)
        pad = self.seqlen + 1 - probe - filled
        return start + pad, kept

    def repeated(self, code: Integers, start: Integers, kept: Flags) -> Flags:
        """Whether a pair's key stands earlier in the sequence, (count, slots + 1)."""
        found = np.zeros_like(kept)
        for slot in range(code.shape[1]):
            same = (code == code[:, slot : slot + 1]) & kept & (start < start[:, slot : slot + 1])
            found[:, slot] = same.any(axis=1) & kept[:, slot]
        return found


def insert_probe(start: Integers, same_key: Flags, passed: Integers, nowhere: int) -> tuple[Integers, Flags]:
    """Where the probe starts among pairs that start at `start` (count, slots), and which of them come behind it.

    It goes in front of the first pair that starts at `passed` or later; not at all (`nowhere`, and no pair behind) where an
    earlier one has its key by chance.
    """
    behind = start >= passed
    by_chance = same_key & ~behind
    behind &= ~by_chance.any(axis=1, keepdims=True)
    slot = np.argmax(behind, axis=1)[:, None]
    probe_start = np.where(behind.any(axis=1, keepdims=True), np.take_along_axis(start, slot, axis=1), nowhere)
    return probe_start, behind


def write(
    sequence: Integers,
    start: Integers,
    length: Integers,
    tokens: Integers,
    kept: Flags,
    marks: Flags | None = None,
    marked: Flags | None = None,
) -> None:
    """sequence[row, start + i] = tokens[i, row, slot] for i < length, where the slot is kept; and marks likewise."""
    place = start + sequence.shape[1] * np.arange(len(sequence))[:, None]  # in the flat sequence
    for i, token in enumerate(tokens):
        here = kept & (i < length)
        sequence.reshape(-1)[place[here] + i] = token[here]
        if marks is not None and marked is not None:
            marks.reshape(-1)[place[here & marked] + i] = True
