"""Families of architectures at any width and depth, and named language models of 70M to 7B parameters.

A family is a pattern of layers, and a model of it is that pattern over and over: ``architecture("striped-hyena", 768, 12)``.
Depth is counted in blocks of two layers, a sequence mixer and a channel mixer. A Mamba layer that stands alone is both, and
half a block, as in the MAD paper (Poli et al. 2024, arXiv 2403.17844).

Striped families begin with the recurrence and have one attention block in four, which the paper finds to be compute-optimal.
Filters reach over the sequences trained on; Hyena and multi-head Hyena have a state of 16 elements for each channel of the
model. An MoE layer costs a token what the SwiGLU in its place would.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import cycle, islice

from madkernels.models.layers.base import check_positive
from madkernels.models.lm import HybridLM
from madkernels.models.spec import Architecture, SpecError, parse
from madkernels.names import did_you_mean

ATTENTION = "attention:heads={dim/64}"
HYENA = "hyena:expand=1,groups=1,order=16,horizon={seqlen}"
MH_HYENA = "mh-hyena:heads={dim/8},horizon={seqlen}"
HYENA_EXPERTS = "hyena-experts:hidden={dim/8},horizon={seqlen}"
MOE = "moe:experts=8,top_k=2,hidden={hidden/2}"

FAMILIES: dict[str, str] = {
    "transformer++": f"{ATTENTION} swiglu",
    "mamba": "mamba",
    "hyena": f"{HYENA} swiglu",
    "mh-hyena": f"{MH_HYENA} swiglu",
    "striped-mamba": f"3*(mamba swiglu) {ATTENTION} swiglu",
    "striped-hyena": f"3*({HYENA} swiglu) {ATTENTION} swiglu",
    "striped-mh-hyena": f"3*({MH_HYENA} swiglu) {ATTENTION} swiglu",
    "striped-hyena-moe": f"3*({HYENA} {MOE}) {ATTENTION} {MOE}",
    "striped-hyena-experts-moe": f"3*({HYENA_EXPERTS} {MOE}) {ATTENTION} {MOE}",
}

LAYERS_A_BLOCK = 2
SEQLEN = 8192

_PLACEHOLDER = re.compile(r"\{([^}]*)\}")


def architecture(family_or_template: str, dim: int, blocks: int, *, seqlen: int = SEQLEN) -> Architecture:
    """A family, or a template of one's own, at a width and a depth.

    The pattern is repeated and cut where the depth is reached. A stack less deep than the pattern is its end, so that two
    blocks of a striped family are a recurrent one and one of attention.

    Args:
        family_or_template: a name of :data:`FAMILIES`, or an architecture string in which may stand

            - ``{dim/N}``: the width over N, or the next smaller number that divides the width; at least 1.
              ``heads={dim/64}`` are heads of about 64 channels;
            - ``{hidden/N}``: the hidden width of SwiGLU over N, rounded up to a multiple of 16;
            - ``{seqlen}``.

        dim: width of the residual stream.
        blocks: depth, in blocks of two layers.
        seqlen: tokens of the sequences trained on.

    Raises:
        ValueError: the template cannot be read, or a size is no whole number from 1.
    """
    check_positive(dim=dim, blocks=blocks, seqlen=seqlen)
    template = FAMILIES.get(family_or_template, family_or_template)
    try:
        pattern = parse(_fill(template, dim, seqlen)).layers
    except SpecError as error:
        meant = did_you_mean(family_or_template, FAMILIES)
        raise ValueError(f"{error}\nfamilies are {', '.join(FAMILIES)}{meant}") from None
    depth = LAYERS_A_BLOCK * blocks
    return Architecture(tuple(islice(cycle(pattern[-depth:]), depth)))


def _fill(template: str, dim: int, seqlen: int) -> str:
    def value(match: re.Match[str]) -> str:
        quantity, _, over = match[1].partition("/")
        if match[1] == "seqlen":
            return str(seqlen)
        if quantity not in ("dim", "hidden") or not re.fullmatch("0*[1-9][0-9]{0,8}", over):
            raise ValueError(f"{template}: {match[0]} is not known; a template takes {{dim/N}}, {{hidden/N}} and {{seqlen}}")
        return str(_divisor(dim, int(over)) if quantity == "dim" else _hidden(dim, int(over)))

    return _PLACEHOLDER.sub(value, template)


def _divisor(dim: int, over: int) -> int:
    """The largest divisor of the width that is at most dim / over; at least 1."""
    return next((n for n in range(dim // over, 1, -1) if dim % n == 0), 1)


def _hidden(dim: int, over: int) -> int:
    """8/3 of the width, over `over`, rounded up to a multiple of 16."""
    return -(-8 * dim // (3 * over) // 16) * 16


@dataclass(frozen=True)
class Preset:
    """A named language model; embedding and unembedding are one matrix.

    Attributes:
        dim, blocks: as of :func:`architecture`.
        vocab_size: that of GPT-NeoX's tokenizer, rounded up to a multiple of 128.
        seqlen: tokens of the sequences trained on.
        lr: peak learning rate of the schedule.
    """

    name: str
    family: str
    dim: int
    blocks: int
    lr: float
    vocab_size: int = 50_304
    seqlen: int = SEQLEN

    @property
    def arch(self) -> Architecture:
        return architecture(self.family, self.dim, self.blocks, seqlen=self.seqlen)

    def model(self) -> HybridLM:
        """The model, on torch's default device."""
        return HybridLM(self.arch, vocab_size=self.vocab_size, dim=self.dim, tied=True)


# Width, blocks, learning rate. Blocks are multiples of four, so that stripes come out even. The parameters that a token
# uses, embedding included, are within 15 % of the name; only the MoE families have others. From 1b on the learning rates are
# those of Savanna's configurations, by the group behind the MAD paper; the rise to 1e-3 below is from memory of the paper.
# None was tuned here.
SIZES: dict[str, tuple[int, int, float]] = {
    "70m": (640, 8, 1e-3),
    "125m": (768, 12, 8e-4),
    "350m": (1024, 24, 6e-4),
    "1b": (1792, 24, 4e-4),
    "3b": (2560, 36, 3e-4),
    "7b": (4096, 32, 3e-4),
}

PRESETS: dict[str, Preset] = {
    f"{family}-{size}": Preset(f"{family}-{size}", family, dim, blocks, lr)
    for family in FAMILIES
    for size, (dim, blocks, lr) in SIZES.items()
}


def preset(name: str) -> Preset:
    """The preset of a name; ValueError where there is none."""
    if name not in PRESETS:
        raise ValueError(
            f"no preset {name!r}; a preset is a family and a size, as in striped-hyena-70m; "
            f"families are {', '.join(FAMILIES)}, sizes {', '.join(SIZES)}{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]
