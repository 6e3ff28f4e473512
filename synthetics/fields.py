"""Values from JSON files: what is unknown, missing, given twice or of another type is named by the place where it stands."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from typing import Any, get_type_hints

from madkernels.names import unknown

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def parse_json(text: str) -> Any:
    """ValueError for keys that are given twice and for NaN, both of which JSON readers let pass."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is given twice in one object")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number")

    return json.loads(text, object_pairs_hook=once, parse_constant=constant)


def fields_of(kind: type) -> dict[str, type]:
    """The fields of a dataclass and their types."""
    types = get_type_hints(kind)
    return {field.name: types[field.name] for field in dataclasses.fields(kind)}


def required(kind: type) -> list[str]:
    """The fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]


def read_object(where: str, data: Any, known: Collection[str], needed: Collection[str]) -> dict[str, Any]:
    """An object with these keys and no other. ValueError names what is unknown or missing."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: got {_shown(data)}; expected an object")
    for name in data:
        if name not in known:
            raise ValueError(f"{where}: {unknown('key', name, known)}")
    for name in needed:
        if name not in data:
            raise ValueError(f"{where}: {name!r} is missing")
    return data


def read_value(where: str, got: Any, kind: type, least: float | None = None) -> Any:
    """A value of a type; a whole number is a number, true and false are none."""
    fits = {int: int, float: (int, float)}.get(kind, kind)
    if kind in _NAMES and (not isinstance(got, fits) or (kind is not bool and isinstance(got, bool))):  # type: ignore[arg-type]
        raise ValueError(f"{where}: got {_shown(got)}; expected {_NAMES[kind]}")
    if kind in (int, float) and (not math.isfinite(got) or (least is not None and got < least)):
        raise ValueError(
            f"{where}: got {_shown(got)}; expected {_NAMES[kind]} from {least if least is not None else '-inf'}"
        )
    return got


def read_list(where: str, got: Any, kind: type, least: float | None = None) -> Sequence[Any]:
    """A list of one value or more, no two alike."""
    if not isinstance(got, list) or not got:
        raise ValueError(f"{where}: got {_shown(got)}; expected a list of one value or more")
    values = [read_value(where, value, kind, least) for value in got]
    if len(set(map(repr, values))) < len(values):
        raise ValueError(f"{where}: got {_shown(got)}; expected each value once")
    return values


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
