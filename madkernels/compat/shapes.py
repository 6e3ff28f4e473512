"""What the adapters say of arguments in their own layouts, before the ops see them in theirs."""

from __future__ import annotations

from torch import Tensor


def check_shape(name: str, t: Tensor | None, *expected: int | str) -> None:
    """Raises a RuntimeError unless `t` is absent or of this shape. An axis with a name in the place of a size has any."""
    if t is None:
        return
    sizes = zip(t.shape, expected, strict=False)
    if t.dim() != len(expected) or any(isinstance(size, int) and size != given for given, size in sizes):
        raise RuntimeError(f"{name} has shape {tuple(t.shape)}; expected ({', '.join(map(str, expected))})")
