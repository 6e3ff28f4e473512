"""Families of architectures at any width and depth, those with published MAD scores at any width, and named language models
of 70M to 7B parameters.

A family is a pattern of layers, and a model of it is that pattern over and over: ``architecture("striped-hyena", 768, 12)``.
Depth is counted in blocks of two layers, a sequence mixer and a channel mixer. A Mamba layer that stands alone is both, and
half a block, as in the MAD paper (Poli et al. 2024, arXiv 2403.17844).

Striped families begin with the recurrence and have one attention block in four, which the paper finds to be compute-optimal.
Filters reach over the sequences trained on; Hyena and multi-head Hyena have a state of 16 elements for each channel of the
model. An MoE layer costs a token what the SwiGLU in its place would.

Those with published MAD scores, `published:NAME`, have the sizes that the paper states at width 128, two blocks; where none
is stated, those of its code. One rule scales them: every width is the same share of the model's; heads keep their width, so
that there are more or fewer; all else, such as states per channel, the order of filters, experts and taps, is as published.
So the fixed state is 32 times the width, 4096 elements at 128, and half of that where attention takes turns with it.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from itertools import cycle, islice

from madkernels.models.layers.base import check_positive
from madkernels.models.lm import HybridLM
from madkernels.models.spec import Architecture, LayerSpec, SpecError, parse
from madkernels.names import did_you_mean, unknown

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

# ---- with published MAD scores

PREFIX = "published:"
PAPER = {"dim": 128, "blocks": 2, "seqlen": 128}  # width and depth of all of them, and length of most settings
WHOLE = 16  # widths are multiples of this, so that every share of them is a whole number

_ATTENTION = "attention:heads={dim/8}"
_FILTER = "horizon={seqlen},turns=0.0001,frequency=1"  # by the code, whose filters reach over a setting's length
_HYENA = f"hyena:expand=4,groups=4,width=3,order=4,{_FILTER}"
_MH_HYENA = f"mh-hyena:heads={{dim/8}},width=3,order=2,{_FILTER}"
_HYENA_EXPERTS = f"hyena-experts:experts=8,top_k=2,hidden={{dim/8}},width=3,order=16,{_FILTER}"
_GLA = "gated-linear-attention:heads={dim/16},rank={dim/8}"
_SWIGLU = "swiglu:hidden={dim*4}"
_MOE = "moe:experts=8,top_k=2,hidden={dim/8}"

PUBLISHED: dict[str, str] = {
    "transformer": f"{_ATTENTION} {_SWIGLU}",
    "hyena": f"{_HYENA} {_SWIGLU}",
    "mh-hyena": f"{_MH_HYENA} {_SWIGLU}",
    "mamba": "mamba:dstate=4,expand=2,width=4",
    "gla": f"{_GLA} {_SWIGLU}",
    "deltanet": f"deltanet:heads={{dim/16}},width=4 {_SWIGLU}",
    "striped-hyena": f"{_HYENA} {_SWIGLU} {_ATTENTION} {_SWIGLU}",
    "striped-hyena-moe": f"{_HYENA} {_MOE} {_ATTENTION} {_MOE}",
    "striped-hyena-experts-moe": f"{_HYENA_EXPERTS} {_MOE} {_ATTENTION} {_MOE}",
}

# ---- at a width and a depth

LAYERS_A_BLOCK = 2
SEQLEN = 8192

_PLACEHOLDER = re.compile(r"\{([^}]*)\}")


def architecture(family_or_template: str, dim: int, blocks: int, *, seqlen: int = SEQLEN) -> Architecture:
    """A family, a published architecture (`published:NAME`), or a template of one's own, at a width and a depth.

    The pattern is repeated and cut where the depth is reached. A stack less deep than the pattern is its end, so that two
    blocks of a striped family are a recurrent one and one of attention.

    Args:
        family_or_template: a name of :data:`FAMILIES`, `published:` and one of :data:`PUBLISHED`, or an architecture string
            in which may stand

            - ``{dim/N}``: the width over N, or the next smaller number that divides the width; at least 1.
              ``heads={dim/64}`` are heads of about 64 channels;
            - ``{dim*N}``: N times the width;
            - ``{hidden/N}``: the hidden width of SwiGLU over N, rounded up to a multiple of 16;
            - ``{seqlen}``.

        dim: width of the residual stream.
        blocks: depth, in blocks of two layers.
        seqlen: tokens of the sequences trained on.

    Raises:
        ValueError: the template cannot be read, a size is no whole number from 1, or the width of a published architecture
            is no multiple of 16.
    """
    check_positive(dim=dim, blocks=blocks, seqlen=seqlen)
    template = FAMILIES.get(family_or_template, family_or_template)
    if is_published(template):
        if dim % WHOLE:
            raise ValueError(f"{template} takes widths that are multiples of {WHOLE}, not {dim}: its sizes are shares of it")
        template = PUBLISHED[published_name(template)]
    try:
        pattern = parse(_fill(template, dim, seqlen)).layers
    except SpecError as error:
        meant = did_you_mean(family_or_template, FAMILIES)
        raise ValueError(f"{error}\nfamilies are {', '.join(FAMILIES)}{meant}") from None
    depth = LAYERS_A_BLOCK * blocks
    return Architecture(tuple(islice(cycle(pattern[-depth:]), depth)))


def resolve(text: str, dim: int, *, seqlen: int) -> Architecture:
    """What an architecture string, or the name of a published architecture (`published:NAME`), stands for at a width.

    Raises:
        ValueError: it cannot be read, there is none of the name, or it does not go with the width.
    """
    return architecture(text.strip(), dim, PAPER["blocks"], seqlen=seqlen) if is_published(text) else parse(text)


def canonical(text: str) -> str:
    """An architecture as records have it: a name as it is, or the layers in full. ValueError where it cannot be read."""
    return PREFIX + published_name(text) if is_published(text) else str(parse(text))


def layers_of(text: str) -> tuple[LayerSpec, ...]:
    """The layers of an architecture whose width is not known; of a name those at the paper's."""
    return resolve(text, PAPER["dim"], seqlen=PAPER["seqlen"]).layers


def is_published(text: str) -> bool:
    """Whether it is the name of a published architecture, though there may be none of that name."""
    return text.strip().startswith(PREFIX)


def published_name(text: str) -> str:
    """The key of :data:`PUBLISHED` that `published:NAME` means. ValueError where there is none."""
    name = text.strip().removeprefix(PREFIX)
    if name not in PUBLISHED:
        raise ValueError(unknown("published architecture", name, PUBLISHED))
    return name


def _fill(template: str, dim: int, seqlen: int) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] == "seqlen":
            return str(seqlen)
        found = re.fullmatch("(dim/|dim[*]|hidden/)0*([1-9][0-9]{0,8})", match[1])
        if not found:
            takes = "{dim/N}, {dim*N}, {hidden/N} and {seqlen}"
            raise ValueError(f"{template}: {match[0]} is not known; a template takes {takes}")
        sizes = {"dim/": _divisor, "dim*": operator.mul, "hidden/": _hidden}
        return str(sizes[found[1]](dim, int(found[2])))

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
