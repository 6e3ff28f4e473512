"""Tables of runs for scaling laws, one row per run: made here, read and edited as CSV, and done by `madkernels scale run`.

Three kinds, as in the MAD paper (Poli et al. 2024, arXiv 2403.17844): `isoflop`, several sizes at each of several budgets of
FLOPs (Hoffmann et al. 2022, arXiv 2203.15556, approach 2); `overtrained`, one size with more and more tokens; `state`,
one size and budget with more and more fixed state.

The FLOPs of a run are three times the model's forward ones (counting.py), unembedding included, on the tokens it sees.
The batch is the same for all runs of a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import torch

from madkernels.files import write_whole
from madkernels.models import HybridLM, counting, normalise
from madkernels.models.presets import architecture
from madkernels.models.spec import Architecture, parse
from madkernels.scaling.fits.runs_table import csv_text, read_table
from madkernels.scaling.training.recipe import LMRun, Recipe


@dataclass(frozen=True)
class Planned:
    """A row of a plan. What follows `tokens_per_param` and stands before `lr` is counted, not chosen.

    Attributes:
        kind: isoflop, overtrained or state.
        architecture: label.
        arch, dim, blocks: the model.
        params, active_params: without embeddings.
        fixed_state, state: elements that do not grow with the sequence, and all of them at its end.
        budget: nominal FLOPs, a label of the group.
        flops: FLOPs that the training takes.
        tokens: that it sees.
        tokens_per_param: of the parameters that a token uses.
    """

    kind: str
    architecture: str
    arch: str
    dim: int
    blocks: int
    params: int
    active_params: int
    fixed_state: int
    state: int
    budget: float
    flops: float
    tokens: int
    tokens_per_param: float
    vocab_size: int
    seqlen: int
    batch: int
    steps: int
    lr: float
    warmup: float
    seed: int

    def run(self, data: str, corpus: str) -> LMRun:
        """The training of this row on prepared data (its hash, and where it is)."""
        recipe = Recipe(self.steps, self.batch, self.seqlen, self.lr, warmup=self.warmup, seed=self.seed)
        labels = (("kind", self.kind), ("architecture", self.architecture), ("budget", self.budget))
        return LMRun(self.arch, self.dim, self.vocab_size, recipe, data, plan=labels, corpus=corpus)


@dataclass(frozen=True)
class Setting:
    """What the runs of a plan have in common.

    Attributes:
        vocab_size, seqlen: of the data and its rows.
        batch: rows of a step at the smallest budget; it grows with the square root of the budget.
        lr: peak learning rate at width 64; it falls with the square root of the width.
        warmup: share of the steps.
        seeds: each run once with each.
    """

    vocab_size: int
    seqlen: int = 256
    batch: int = 4
    lr: float = 6e-3
    warmup: float = 0.05
    seeds: tuple[int, ...] = (12345,)


@dataclass(frozen=True)
class Counts:
    """What one model takes; parameters without embeddings."""

    params: int
    active_params: int
    fixed_state: int
    state: int
    flops_per_token: float  # of training


@lru_cache(maxsize=4096)
def counts(arch: Architecture, dim: int, vocab_size: int, seqlen: int) -> Counts:
    """Sizes and costs of a model, without allocating it. ValueError where the architecture does not go with the width."""
    with torch.device("meta"):
        model = HybridLM(arch, vocab_size=vocab_size, dim=dim, tied=True)
    embedding = counting.embedding_params(model)
    return Counts(
        counting.params(model) - embedding,
        counting.active_params(model) - embedding,
        normalise.fixed_state(arch, dim),
        counting.state_size(model, seqlen),
        counting.training_flops(model, seqlen),
    )


def isoflop(
    archs: dict[str, str],
    budgets: Sequence[float],
    dims: Sequence[int],
    setting: Setting,
    *,
    blocks: int,
    sizes: int = 5,
    ratio: float = 20.0,
) -> list[Planned]:
    """At each budget `sizes` neighbours of the ladder of widths, around that whose tokens per parameter are nearest `ratio`.

    Args:
        archs: families or templates (:func:`madkernels.models.presets.architecture`), by label.
        budgets: training FLOPs.
        dims: the ladder of widths.
        blocks: depth.

    Raises:
        ValueError: the ladder has fewer widths than `sizes`, a budget is too small for one step, or an architecture does not
            go with a width.
    """
    for template in archs.values():  # a name that is not known is told before the sizes
        architecture(template, min(dims), blocks, seqlen=setting.seqlen)
    if len(dims) < sizes:
        raise ValueError(f"{len(dims)} widths do not make {sizes} sizes; give more widths")
    rows = []
    for label, template in archs.items():
        for budget in budgets:
            ladder = [_row("isoflop", label, template, dim, blocks, budget, budgets, setting) for dim in sorted(dims)]
            nearest = min(range(len(ladder)), key=lambda i: abs(math.log(ladder[i].tokens_per_param / ratio)))
            first = min(max(nearest - sizes // 2, 0), len(ladder) - sizes)
            rows += ladder[first : first + sizes]
    return _with_seeds(rows, setting)


def overtrained(archs: dict[str, str], dim: int, ratios: Sequence[float], setting: Setting, *, blocks: int) -> list[Planned]:
    """One size, trained on each of `ratios` tokens per parameter."""
    rows = []
    for label, template in archs.items():
        arch = architecture(template, dim, blocks, seqlen=setting.seqlen)
        found = counts(arch, dim, setting.vocab_size, setting.seqlen)
        budgets = [ratio * found.active_params * found.flops_per_token for ratio in ratios]
        rows += [_row("overtrained", label, template, dim, blocks, b, [b], setting) for b in budgets]
    return _with_seeds(rows, setting)


def states(
    archs: dict[str, str], dim: int, budget: float, sizes: Sequence[int], setting: Setting, *, blocks: int
) -> list[Planned]:
    """One width and budget, and the fixed state set to each of `sizes` elements. ValueError where one cannot be reached."""
    rows = []
    for label, template in archs.items():
        arch = architecture(template, dim, blocks, seqlen=setting.seqlen)
        for size in sizes:
            with_state = str(normalise.with_state(arch, size, dim))
            rows.append(_row("state", label, with_state, dim, blocks, budget, [budget], setting))
    return _with_seeds(rows, setting)


def _row(
    kind: str, label: str, template: str, dim: int, blocks: int, budget: float, budgets: Sequence[float], setting: Setting
) -> Planned:
    arch = architecture(template, dim, blocks, seqlen=setting.seqlen)
    found = counts(arch, dim, setting.vocab_size, setting.seqlen)
    batch = max(1, round(setting.batch * math.sqrt(budget / min(budgets))))
    steps = round(budget / found.flops_per_token / (batch * setting.seqlen))
    if steps < 1:
        raise ValueError(f"{label} at width {dim}: a budget of {budget:g} FLOPs is less than one step")
    tokens = steps * batch * setting.seqlen
    return Planned(
        kind=kind,
        architecture=label,
        arch=str(arch),
        dim=dim,
        blocks=blocks,
        params=found.params,
        active_params=found.active_params,
        fixed_state=found.fixed_state,
        state=found.state,
        budget=budget,
        flops=tokens * found.flops_per_token,
        tokens=tokens,
        tokens_per_param=tokens / found.active_params,
        vocab_size=setting.vocab_size,
        seqlen=setting.seqlen,
        batch=batch,
        steps=steps,
        lr=setting.lr * math.sqrt(64 / dim),
        warmup=setting.warmup,
        seed=setting.seeds[0],
    )


def _with_seeds(rows: Sequence[Planned], setting: Setting) -> list[Planned]:
    return [replace(row, seed=seed) for row in rows for seed in setting.seeds]


# ---- as CSV


def write_plan(rows: Sequence[Planned], path: Path) -> None:
    """One line per run."""
    write_whole(path, csv_text([f.name for f in fields(Planned)], map(asdict, rows)))


def read_plan(path: Path) -> list[Planned]:
    """ValueError says what column is missing, or which line cannot be read."""
    kinds: dict[str, Any] = get_type_hints(Planned)
    table = read_table(path)
    if missing := kinds.keys() - table.columns.keys():
        raise ValueError(f"{path} is no plan: it has no column {', '.join(sorted(missing))}")
    if not len(table):
        raise ValueError(f"{path} has no runs")
    rows = []
    for number in range(len(table)):
        try:
            row = Planned(**{name: _value(name, kind, table.column(name)[number]) for name, kind in kinds.items()})
            counts(parse(row.arch), row.dim, row.vocab_size, row.seqlen)
        except ValueError as error:
            raise ValueError(f"{table.place(number)}: {error}") from None
        rows.append(row)
    return rows


def _value(name: str, kind: type, cell: str) -> Any:
    try:
        return kind(cell)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{name} is {cell!r}; expected {expected}") from None
