"""Random numbers by counter: a draw is a hash of (seed, stream, example, draw), not the next state of a generator.

So example 7 of a seed is the same whether it is made alone or among thousands, and splits never overlap. The hash is the
finaliser of splitmix64 (Steele, Lea and Flood 2014) over a Weyl sequence, for each example with a start of its own.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
Bits = NDArray[np.uint64]
Flags = NDArray[np.bool_]

_WEYL = np.uint64(0x9E3779B97F4A7C15)


def mix(x: Bits) -> Bits:
    """A bijection of 64-bit integers whose outputs look independent; changes `x` in place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


class Draws:
    """The draws of examples `start` to `start + count` of a stream, which is named by anything with a repr."""

    def __init__(self, stream: Any, start: int, count: int) -> None:
        key = int.from_bytes(hashlib.sha256(repr(stream).encode()).digest()[:8], "little")
        self.numbers: Integers = np.arange(start, start + count)  # (count,)
        self.examples: Bits = mix(mix(self.numbers.astype(np.uint64) + np.uint64(1)) ^ np.uint64(key))  # (count,)
        self.used = 0

    def bits(self, shape: tuple[int, ...]) -> Bits:
        """Fresh bits, (count, *shape)."""
        draws = int(np.prod(shape))
        offsets = np.arange(self.used + 1, self.used + draws + 1, dtype=np.uint64) * _WEYL
        self.used += draws
        return mix(self.examples[:, None] + offsets).reshape(len(self.examples), *shape)

    def uniform(self, *shape: int) -> Reals:
        """Uniform numbers in [0, 1), (count, *shape)."""
        return to_unit(self.bits(shape))

    def below(self, bound: int, *shape: int) -> Integers:
        """Integers from 0 to bound - 1, (count, *shape); two from each 64 bits."""
        draws = int(np.prod(shape))
        halves = self.bits(((draws + 1) // 2,)).view(np.uint32)[:, :draws]
        scaled = halves.astype(np.uint64)
        scaled *= np.uint64(bound)
        scaled >>= np.uint64(32)
        return scaled.view(np.int64).reshape(len(self.examples), *shape)

    def of(self, codes: Integers) -> Reals:
        """A fixed uniform number for each (example, code), codes (count, ...): a random function, drawn as asked for."""
        examples = self.examples.reshape(-1, *(1,) * (codes.ndim - 1))
        return to_unit(mix(mix(codes.astype(np.uint64) * _WEYL + np.uint64(1)) ^ examples))


def to_unit(bits: Bits) -> Reals:
    unit: Reals = (bits >> np.uint64(11)).astype(np.float64)
    unit *= 2.0**-53
    return unit


def split_unit(uniform: Reals, choices: int) -> tuple[Integers, Reals]:
    """One choice out of `choices` from a uniform number, and a uniform number that is independent of it.

    A double holds 53 bits, so the product of all choices taken from one number must stay far below 2^53.
    """
    scaled = uniform * choices
    whole = scaled.astype(np.int64)
    return whole, scaled - whole


def distinct(uniform: Reals, choices: int, length: int) -> Integers:
    """`length` distinct integers below `choices`, in random order, from one uniform number each: (length, ...)."""
    chosen = np.empty((length, *uniform.shape), dtype=np.int64)
    taken: list[Integers] = []  # ascending
    for i in range(length):
        pick, uniform = split_unit(uniform, choices - i)
        for before in taken:
            pick += pick >= before  # skip what is taken, smallest first
        chosen[i] = pick
        for j, before in enumerate(taken):
            taken[j], pick = np.minimum(before, pick), np.maximum(before, pick)
        taken.append(pick)
    return chosen
