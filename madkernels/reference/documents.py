"""Documents packed one after another along a sequence."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def document_bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """The (begin, end) of each document; `cu_seqlens` (num_docs + 1,) holds the offsets of their first tokens and the end."""
    return list(pairwise(cu_seqlens.tolist()))
