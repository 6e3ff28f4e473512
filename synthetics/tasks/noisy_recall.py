"""In-context recall among noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from madkernels.synthetics.draws import Draws, Flags, Integers
from madkernels.synthetics.tasks.recall import Recall


@dataclass(frozen=True)
class NoisyRecall(Recall):
    """As :class:`Recall`, but each pair is, with probability `frac_noise`, two noise tokens: the top `noise_vocab` tokens.

    One pair before the last, drawn evenly, is never noise, so the last key always has a pair before it. (The published
    generator may draw the last pair, and then fails on the rare sequence that is all noise.)
    """

    name: ClassVar[str] = "noisy-recall"
    summary: ClassVar[str] = "recall, with pairs of irrelevant tokens in between"

    noise_vocab: int = 16
    frac_noise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.frac_noise <= 1, f"frac_noise {self.frac_noise}: it takes a number from 0 to 1")
        self.require(self.noise_vocab >= 1, f"noise_vocab {self.noise_vocab}: it takes one token at least")

    @property
    def content(self) -> int:
        return self.vocab_size - self.noise_vocab

    def roles(self) -> dict[str, range]:
        return super().roles() | {"noise": range(self.content, self.vocab_size)}

    def noise(self, draws: Draws, pairs: int) -> Flags:
        noise = draws.uniform(pairs) < self.frac_noise
        noise[np.arange(len(noise)), draws.below(pairs - 1)] = False
        noise[:, -1] = False
        return noise

    def lay_out(self, draws: Draws, keys: Integers, values: Integers, noise: Flags | None) -> Integers:
        pairs = np.stack([keys, values], axis=-1)
        irrelevant = self.content + draws.below(self.noise_vocab, *pairs.shape[1:])
        assert noise is not None
        return np.where(noise[..., None], irrelevant, pairs).reshape(len(keys), -1)
