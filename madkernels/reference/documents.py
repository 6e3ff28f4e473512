"""Documents packed one after another along a sequence."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def document_bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """The (begin, end) of each document; `cu_seqlens` (num_docs + 1,) holds where each begins, and the end of the last."""
    return list(pairwise(cu_seqlens.tolist()))
