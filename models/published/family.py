"""What a family of published models says of itself, and which of its tensors hold which parameters."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madkernels.models.lm import HybridLM
from madkernels.models.published.checkpoint import Config
from madkernels.models.spec import Architecture, LayerSpec, Value, options_of


@dataclass(frozen=True)
class Entry:
    """A parameter here, the tensors there that hold it, and how it is made of them and they of it; of families that are read
    alone, not how they are of it."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Attributes:
        read: the architecture that a configuration means, and the options of :class:`HybridLM`; ValueError for what the
            layers here cannot.
        entries: where the parameters of a model are in a checkpoint that has tensors of these names, and a configuration.
        describe: the configuration of a model, None where it is of another family; ValueError for what the family cannot. Of
            families that are read alone there is none.
    """

    model_type: str
    read: Callable[[Config], tuple[Architecture, dict[str, Any]]]
    entries: Callable[[HybridLM, Container[str], Config], list[Entry]]
    describe: Callable[[HybridLM], dict[str, Any] | None] | None = None


def same(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,), lambda tensors: tensors[0], lambda t: [t])


def taps(ours: str, theirs: str) -> Entry:
    """Of a depthwise convolution: (channels, width) here, (channels, 1, width) there."""
    return Entry(ours, (theirs,), lambda tensors: tensors[0].squeeze(1), lambda t: [t.unsqueeze(1)])


def rows(ours: str, sizes: Mapping[str, int]) -> Entry:
    """Tensors of so many rows each, one below the other."""
    heights = list(sizes.values())
    return Entry(ours, tuple(sizes), lambda tensors: torch.cat(list(tensors)), lambda t: torch.split(t, heights))


def repeated(arch: Architecture, *names: str) -> list[dict[str, Value]] | None:
    """The options of each of these layers, where the architecture is they over and over; None where it is not.

    Raises:
        ValueError: layers of one name differ in their options.
    """
    layers = arch.layers
    if [layer.name for layer in layers] != list(names) * (len(layers) // len(names)):
        return None
    firsts = layers[: len(names)]
    for i, layer in enumerate(layers):
        if layer != firsts[i % len(names)]:
            raise ValueError(
                f"layers differ, {layer} from {firsts[i % len(names)]}; a published family has one of each kind"
            )
    return [options_of(layer.name) | dict(layer.options) for layer in firsts]


def stack(blocks: int, *layers: LayerSpec) -> Architecture:
    return Architecture(layers * blocks)


def only(layer: str, options: Mapping[str, Value], **wanted: Value) -> None:
    """Raises ValueError unless the options are those that the family has."""
    for key, value in wanted.items():
        if options[key] != value:
            raise ValueError(f"{layer} has {key}={options[key]}; its published family has {key}={value} alone")
