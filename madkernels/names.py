"""Names that a user types and that are not known: the error says what there is, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """An error message: the name is unknown, what there is, what was probably meant."""
    names = list(known)
    return f"unknown {what} {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of an error message: the nearest of the known names, in any case of letters; empty if none is near."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""
