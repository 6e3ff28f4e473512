"""Sizes of models, from which each op's module makes a case: widths, heads, experts and states are those of the presets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from madkernels.models.layers import Layer
from madkernels.models.presets import FAMILIES, SEQLEN, SIZES, architecture
from madkernels.models.spec import LayerSpec, parse
from madkernels.names import did_you_mean
from madkernels.synthetics.protocol import load_protocol

TOKENS = {"cpu": 1024, "cuda": 16384}  # of a call at a model's size: a CPU has no time for more
MAD = "mad"
NAMES = (MAD, *SIZES)


@dataclass(frozen=True)
class Size:
    """A size of models: its width, and the sequences of a call. That of MAD has layers by their defaults, as the paper's
    protocol trains them; the others have those of the families of presets."""

    name: str
    dim: int
    batch: int
    seqlen: int

    def spec(self, layer: str) -> LayerSpec:
        """The layer of a name with the options it has in the first family that has it, or by its defaults."""
        families = [] if self.name == MAD else list(FAMILIES)
        specs = [spec for family in families for spec in architecture(family, self.dim, 4).layers if spec.name == layer]
        return specs[0] if specs else parse(layer).layers[0]

    def layer(self, name: str) -> Layer:
        """The same, built without memory: to be asked for its sizes."""
        with torch.device("meta"):
            return self.spec(name).build(self.dim)


def size_of(name: str, device: str, seqlen: int | None = None) -> Size:
    """The size of a name, with the tokens that a call has on a device, at a sequence length if one is given.

    Raises:
        ValueError: there is no such size.
    """
    if name == MAD:
        protocol = load_protocol("paper")
        dim, usual = protocol.trainings[0].dim, protocol.settings["recall"][0].seqlen
        tokens = protocol.trainings[0].batch * usual
    elif name in SIZES:
        tokens, dim, usual = TOKENS[device], SIZES[name][0], min(SEQLEN, TOKENS[device])
    else:
        raise ValueError(f"--preset: no size {name!r}; expected {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    seqlen = seqlen or usual
    return Size(name, dim, max(1, tokens // seqlen), seqlen)


def seqlens(text: str) -> list[int]:
    """Sequence lengths from "1k,4096,16k", a k being 1,024; ValueError where it cannot be read."""
    found = [re.fullmatch("0*([1-9][0-9]{0,8})(k?)", part) for part in text.split(",")]
    if not all(found):
        raise ValueError(f"--seqlen: {text!r} is no list of lengths; expected one such as 1k,4096,16k")
    return [int(match[1]) * (1024 if match[2] else 1) for match in found if match]
