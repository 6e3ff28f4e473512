"""Selective copying: repeat the content tokens, in order, and nothing of what lies between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from madkernels.synthetics.draws import Draws, Integers
from madkernels.synthetics.tasks.base import IGNORE, Split, Task


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """`copies` content tokens among blanks, then the copy token, then blanks to be replaced by the content.

    Each blank is put before a content token chosen evenly, so the last content token stands right before the copy token. The
    copy token is the last of the vocabulary, the blank the one before it. The targets are not shifted: they stand at the
    closing blanks.
    """

    name: ClassVar[str] = "selective-copying"
    summary: ClassVar[str] = "copy the content tokens in order, skipping the blanks"

    copies: int = 16

    def __post_init__(self) -> None:
        self.require(self.vocab_size >= 3, f"vocab_size {self.vocab_size} is too small: it takes 3 at least")
        self.require(self.copies >= 1, f"copies {self.copies}: it takes one at least")
        shortest = 2 * self.copies + 2
        self.require(
            self.seqlen >= shortest, f"seqlen {self.seqlen} is too short for {self.copies} copies: it takes {shortest}"
        )

    def roles(self) -> dict[str, range]:
        blank = self.vocab_size - 2
        return {"content": range(blank), "blank": range(blank, blank + 1), "copy": range(blank + 1, blank + 2)}

    def make(self, draws: Draws, seed: int, split: Split) -> tuple[Integers, Integers]:
        count, blanks = len(draws.examples), self.seqlen - 2 * self.copies - 1
        content = draws.below(self.vocab_size - 2, self.copies)
        before = draws.below(self.copies, blanks)  # the content token that each blank stands before
        flat = before + self.copies * np.arange(count)[:, None]
        gaps = np.bincount(flat.ravel(), minlength=count * self.copies).reshape(count, self.copies)
        places = np.cumsum(gaps, axis=1) + np.arange(self.copies)
        inputs = np.full((count, self.seqlen), self.vocab_size - 2)
        np.put_along_axis(inputs, places, content, axis=1)
        inputs[:, -self.copies - 1] = self.vocab_size - 1
        targets = np.full_like(inputs, IGNORE)
        targets[:, -self.copies :] = content
        return inputs, targets
