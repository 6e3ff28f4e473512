"""Compression: bring a whole sequence through one vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from madkernels.synthetics.draws import Draws, Integers
from madkernels.synthetics.tasks.base import Split, Task


@dataclass(frozen=True)
class Compression(Task):
    """Random content, then the compression token (the last of the vocabulary), at which the model's vector is taken.

    Every position is a target, the compression token's own included, which is trivial.
    """

    name: ClassVar[str] = "compression"
    summary: ClassVar[str] = "give back a random sequence from the vector at its last position"
    autoencoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require(self.vocab_size >= 2, f"vocab_size {self.vocab_size} is too small: it takes 2 at least")
        self.require(self.seqlen >= 2, f"seqlen {self.seqlen} is too short: it takes 2 at least")

    def roles(self) -> dict[str, range]:
        last = self.vocab_size - 1
        return {"content": range(last), "compress": range(last, last + 1)}

    def make(self, draws: Draws, seed: int, split: Split) -> tuple[Integers, Integers]:
        inputs = np.full((len(draws.examples), self.seqlen), self.vocab_size - 1)
        inputs[:, :-1] = draws.below(self.vocab_size - 1, self.seqlen - 1)
        return inputs, inputs.copy()
