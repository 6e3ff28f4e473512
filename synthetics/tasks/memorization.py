"""Memorization: learn a fixed map by heart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from madkernels.synthetics.draws import Draws, Integers
from madkernels.synthetics.tasks.base import IGNORE, Split, Task


@dataclass(frozen=True)
class Memorization(Task):
    """Keys, each followed by the insert token (the last of the vocabulary), where its value is the target.

    The map from keys to values is one for all sequences and splits; it depends on the vocabulary and the seed, and nothing
    in the inputs tells it. The training set is small and fixed: with more facts than it shows, the share of facts that
    occur in it is the ceiling of the score (0.63 at a vocabulary of 8192 with 256 sequences of length 32). With `covered`
    the training set goes through the facts in turn, so that each occurs, and all about as often.
    """

    name: ClassVar[str] = "memorization"
    summary: ClassVar[str] = "know the value of each key, which no sequence tells"

    train_examples: int = 256
    covered: bool = False

    def __post_init__(self) -> None:
        self.require(self.vocab_size >= 3, f"vocab_size {self.vocab_size} is too small: it takes 3 at least")
        self.require(self.seqlen >= 2 and self.seqlen % 2 == 0, f"seqlen {self.seqlen}: it takes an even one from 2")

    @property
    def keys(self) -> int:
        return (self.vocab_size - 1) // 2

    def roles(self) -> dict[str, range]:
        insert = self.vocab_size - 1
        return {"key": range(self.keys), "value": range(self.keys, insert), "insert": range(insert, insert + 1)}

    def facts(self, seed: int) -> Integers:
        """The value of each key, (keys,); no two alike."""
        order = Draws(("memorization facts", self.vocab_size, seed), 0, 1).uniform(self.vocab_size - 1 - self.keys)[0]
        return self.keys + np.argsort(order)[: self.keys]

    def make(self, draws: Draws, seed: int, split: Split) -> tuple[Integers, Integers]:
        pairs = self.seqlen // 2
        keys = self.in_turn(draws.numbers, seed) if self.covered and split == "train" else draws.below(self.keys, pairs)
        inputs = np.full((len(keys), self.seqlen), self.vocab_size - 1)
        inputs[:, ::2] = keys
        targets = np.full_like(inputs, IGNORE)
        targets[:, 1::2] = self.facts(seed)[keys]
        return inputs, targets

    def in_turn(self, examples: Integers, seed: int) -> Integers:
        """The keys of training examples, (count, pairs): one shuffled order of all, again and again."""
        pairs = self.seqlen // 2
        enough = self.train_examples * pairs >= self.keys
        self.require(enough, f"{self.train_examples} examples of {pairs} pairs cannot cover {self.keys} facts")
        order = np.argsort(Draws(("memorization order", self.vocab_size, seed), 0, 1).uniform(self.keys)[0])
        place = examples[:, None] * pairs + np.arange(pairs)
        keys: Integers = order[place % self.keys]
        return keys
