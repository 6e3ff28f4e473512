"""What every task offers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from madkernels.synthetics.draws import Draws, Flags, Integers

Split = Literal["train", "validation", "test"]
IGNORE = -100  # the target of a position that is not scored; torch's cross-entropy skips it


@dataclass(frozen=True)
class Task:
    """One setting of one task.

    Args:
        vocab_size: all tokens, special and noise tokens included.
        seqlen: length of a sequence as the task states it; `length` is that of the inputs.
        train_examples: size of the training set.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    autoencoder: ClassVar[bool] = False  # whether the sequence goes through one vector

    vocab_size: int
    seqlen: int
    train_examples: int = 12800

    def generate(self, count: int, *, seed: int, split: Split, start: int = 0) -> tuple[Tensor, Tensor]:
        """Examples `start` to `start + count` of a split: inputs and targets, (count, length) int64 each.

        An example depends on the task's setting, the seed, the split and its number, not on what is made beside it. Targets
        are IGNORE where nothing is scored. In training some tasks score more positions than in validation and test.
        """
        setting = dataclasses.replace(self, train_examples=0)  # more examples of a setting begin with those of fewer
        inputs, targets = self.make(Draws((setting, seed, split), start, count), seed, split)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def make(self, draws: Draws, seed: int, split: Split) -> tuple[Integers, Integers]:
        """Inputs and targets, (count, length) each, from the draws of `count` examples."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Length of inputs and targets."""
        return self.seqlen

    def roles(self) -> dict[str, range]:
        """What the tokens stand for, where they differ."""
        return {}

    def options(self) -> dict[str, Any]:
        """The setting, by name."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{self.name} " + " ".join(f"{k}={v}" for k, v in self.options().items())

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(f"{self.name}: {problem}")


def next_tokens(sequence: Integers, scored: Flags | None) -> tuple[Integers, Integers]:
    """Inputs and targets of predicting the next token; `scored` (like sequence) marks the tokens to predict, or all are."""
    labels = sequence if scored is None else np.where(scored, sequence, IGNORE)
    return np.ascontiguousarray(sequence[:, :-1]), np.ascontiguousarray(labels[:, 1:])
