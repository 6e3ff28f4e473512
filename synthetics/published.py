"""The published MAD scores and perplexities, how they go together, and how far a ranking agrees with theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau, pearsonr, spearmanr

from madkernels.models.presets import is_published, layers_of, published_name

FILE = Path(__file__).parent / "published.json"

# The layers that make a published architecture, whatever their sizes and order.
_FAMILIES: dict[frozenset[str], str] = {
    frozenset({"attention", "swiglu"}): "Transformer",
    frozenset({"hyena", "swiglu"}): "Hyena",
    frozenset({"mh-hyena", "swiglu"}): "MH Hyena",
    frozenset({"mamba"}): "Mamba",
    frozenset({"gated-linear-attention", "swiglu"}): "GLA",
    frozenset({"deltanet", "swiglu"}): "DeltaNet",
    frozenset({"hyena", "attention", "swiglu"}): "Striped Hyena + SwiGLU",
    frozenset({"hyena", "attention", "moe"}): "Striped Hyena + MoE",
    frozenset({"hyena-experts", "attention", "moe"}): "Striped Hyena Experts + MoE",
}


@dataclass(frozen=True)
class Published:
    """One row: scores in parts of 1. `arch`: a key of :data:`madkernels.models.presets.PUBLISHED`; `note`: what of it is
    open, or cannot be built."""

    name: str
    arch: str
    source: str
    mad: float
    tasks: dict[str, float]
    perplexity: float | None = None
    note: str = ""


@cache
def published() -> dict[str, Published]:
    """The published rows by name."""
    return {row["name"]: Published(**row) for row in json.loads(FILE.read_text())["models"]}


def sources() -> dict[str, str]:
    found: dict[str, str] = json.loads(FILE.read_text())["sources"]
    return found


def family(arch: str) -> str | None:
    """The published architecture that it is, by name, or else one of, by its kinds of layers; None: of none."""
    try:
        return named(arch) or _FAMILIES.get(frozenset(spec.name for spec in layers_of(arch)))
    except ValueError:  # a layer from outside that is not here, or a name of another version
        return None


def named(arch: str) -> str | None:
    """The published architecture that `published:NAME` is, with its sizes; None for an architecture string."""
    if not is_published(arch):
        return None
    arch = published_name(arch)
    return next(row.name for row in published().values() if row.arch == arch)


@dataclass(frozen=True)
class Agreement:
    """Two rankings of the same things."""

    count: int
    spearman: float
    kendall: float
    pearson: float


def agreement(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Agreement | None:
    """How the rankings of what both have agree; None for fewer than three, or where all are alike."""
    shared = sorted(set(ours) & set(theirs))
    a, b = ([values[name] for name in shared] for values in (ours, theirs))
    if len(shared) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    tests: list[Any] = [spearmanr(a, b), kendalltau(a, b), pearsonr(a, b)]
    return Agreement(len(shared), *(float(test[0]) for test in tests))


def score_against_perplexity(task: str | None = None) -> Agreement | None:
    """How the published scores, of one task or their mean, go with the perplexities published beside them."""
    known = {name: row for name, row in published().items() if row.perplexity is not None}
    ours = {name: row.mad if task is None else row.tasks[task] for name, row in known.items()}
    return agreement(ours, {name: row.perplexity for name, row in known.items() if row.perplexity is not None})
