"""Architectures as strings.

    architecture := item+
    item         := [count '*'] (layer | '(' architecture ')')
    layer        := name [':' option '=' value (',' option '=' value)*]

For example ``"4*(hyena swiglu) attention:heads=8 moe:experts=8,top_k=2"``. A layer is one residual branch: a sequence mixer
or a channel mixer. Names are those of :data:`madkernels.models.layers.LAYERS`, options the keyword arguments of its class.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from madkernels.models.layers import LAYERS, Layer
from madkernels.names import did_you_mean, unknown

Value = int | float | bool

_TOKEN = re.compile(r"\s*([0-9]+\s*\*|[()]|[^\s()]+)")

# Far beyond any model; a slip of the finger is refused before it fills the memory.
MAX_LAYERS = 4096
MAX_DEPTH = 32


class SpecError(ValueError):
    """An architecture string that cannot be read; the message shows where and what would be right."""

    def __init__(self, text: str, start: int, length: int, problem: str) -> None:
        super().__init__(f"{problem}\n  {text}\n  {' ' * start}{'^' * max(length, 1)}")


@dataclass(frozen=True)
class LayerSpec:
    """One layer: its name, and its options by name, without those that are as they would be if not given."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        options = ",".join(f"{key}={str(value).lower()}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name

    @property
    def layer(self) -> type[Layer]:
        """Its class, which says what kind of layer it is."""
        return LAYERS[self.name]

    def build(self, dim: int) -> Layer:
        """The layer at a width; ValueError where its options do not go with it."""
        try:
            return self.layer(dim, **dict(self.options))
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from None


def layer_spec(name: str, options: Mapping[str, Value]) -> LayerSpec:
    """A layer with these options."""
    defaults = options_of(name)
    return LayerSpec(name, tuple(sorted((key, value) for key, value in options.items() if value != defaults[key])))


@dataclass(frozen=True)
class Architecture:
    """A stack of layers, first to last."""

    layers: tuple[LayerSpec, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.layers))


def parse(text: str) -> Architecture:
    """Reads an architecture string; SpecError where it cannot."""
    tokens = [(m.group(1), m.start(1)) for m in _TOKEN.finditer(text)]
    if not tokens:
        raise SpecError(text, 0, 1, "an architecture needs at least one layer, such as attention")
    parser = _Parser(text, tokens)
    layers = tuple(parser.items(depth=0))
    return Architecture(layers)


class _Parser:
    def __init__(self, text: str, tokens: list[tuple[str, int]]) -> None:
        self.text, self.tokens, self.next = text, tokens, 0

    def items(self, depth: int) -> Iterator[LayerSpec]:
        opened, found = self.next, 0
        while self.next < len(self.tokens):
            token, start = self.tokens[self.next]
            if token == ")":
                if depth == 0:
                    raise SpecError(self.text, start, 1, "this ) closes nothing")
                return
            layers = self.item(depth)
            found += len(layers)
            if found > MAX_LAYERS:
                raise SpecError(self.text, start, len(token), f"more than {MAX_LAYERS} layers")
            yield from layers
        if depth > 0:
            raise SpecError(self.text, self.tokens[opened - 1][1], 1, "this ( is never closed")

    def item(self, depth: int) -> list[LayerSpec]:
        token, start = self.take()
        if depth > MAX_DEPTH:
            raise SpecError(self.text, start, len(token), f"repetitions and brackets go {MAX_DEPTH} deep at most")
        if token.endswith("*"):
            digits = token[:-1].rstrip()
            if not re.fullmatch("[0-9]{1,9}", digits) or not 1 <= (count := int(digits)) <= MAX_LAYERS:
                raise SpecError(self.text, start, len(token), f"a repetition counts from 1 to {MAX_LAYERS}")
            if self.next == len(self.tokens) or self.tokens[self.next][0] == ")":
                raise SpecError(self.text, start, len(token), "nothing follows to be repeated")
            layers = self.item(depth + 1)
            if len(layers) * count > MAX_LAYERS:
                raise SpecError(self.text, start, len(token), f"more than {MAX_LAYERS} layers: {count} times {len(layers)}")
            return layers * count
        if token == "(":
            layers = list(self.items(depth + 1))
            _, end = self.take()
            if not layers:
                raise SpecError(self.text, start, end - start + 1, "nothing between the brackets")
            return layers
        return [self.layer(token, start)]

    def take(self) -> tuple[str, int]:
        self.next += 1
        return self.tokens[self.next - 1]

    def layer(self, word: str, start: int) -> LayerSpec:
        name, colon, rest = word.partition(":")
        if name not in LAYERS:
            raise SpecError(self.text, start, len(name), unknown("layer", name, LAYERS) + _preset(name))
        options: dict[str, Value] = {}
        at = start + len(name) + 1
        for part in rest.split(",") if colon else ():
            key, value = self.option(name, part, at)
            if key in options:
                raise SpecError(self.text, at, len(part), f"option {key!r} is given twice")
            options[key] = value
            at += len(part) + 1
        return layer_spec(name, options)

    def option(self, layer: str, part: str, at: int) -> tuple[str, Value]:
        key, equals, value = part.partition("=")
        defaults = options_of(layer)
        if key not in defaults:
            takes = (", ".join(defaults) or "no options") + did_you_mean(key, defaults)
            raise SpecError(self.text, at, len(key), f"unknown option {key!r}; {layer} takes {takes}")
        kind = type(defaults[key])
        if not equals:
            raise SpecError(self.text, at, len(part), f"option {key!r} needs a value, as in {key}={defaults[key]}")
        try:
            return key, _read(value, kind)
        except ValueError:
            wanted = {int: "a whole number from 1", float: "a number", bool: "true or false"}[kind]
            raise SpecError(
                self.text, at + len(key) + 1, len(value), f"option {key!r} takes {wanted}, not {value!r}"
            ) from None


def _preset(name: str) -> str:
    """What to do with the name of a preset or of a family, which stand for more than a layer."""
    from madkernels.models.presets import FAMILIES, PREFIX, PRESETS  # which read architectures themselves

    if name in PRESETS:
        return f"; {name} is a preset: madkernels.models.presets.preset({name!r}).arch"
    if name + ":" == PREFIX:
        return "; published:NAME is a whole architecture, stands alone, and takes a width: madkernels.models.presets.resolve"
    if name in FAMILIES:
        return f"; {name} is a family: madkernels.models.presets.architecture({name!r}, dim, blocks)"
    return ""


def options_of(layer: str) -> dict[str, Value]:
    """The options of a layer and their defaults."""
    parameters = inspect.signature(LAYERS[layer]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _read(text: str, kind: type) -> Value:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError
        return text == "true"
    if kind is float:
        return float(text)
    if not re.fullmatch("0*[1-9][0-9]{0,11}", text):
        raise ValueError
    return int(text)
