"""Looks for architectures: patterns of mixers under budgets, by successive halving over a protocol's settings.

Every candidate is scored on a few settings of each task, the best third goes on to more, until those that are left have been
scored on the whole protocol (Jamieson and Talwalkar 2016, arXiv 1502.07943). A run that a later rung needs again is not done
again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from madkernels.models.spec import parse
from madkernels.runs.engines import Engine
from madkernels.runs.execute import Progress
from madkernels.runs.store import Store
from madkernels.synthetics.protocol import Protocol, Run, mad_score, plan, scores
from madkernels.synthetics.report import Cost, cost_of
from madkernels.synthetics.sweep import check, sweep

KEEP = 3  # one of so many goes on


@dataclass(frozen=True)
class Budget:
    """The most that a candidate may take, at the protocol's width and the first setting's length."""

    state: float = math.inf
    parameters: float = math.inf
    flops: float = math.inf

    def allows(self, cost: Cost | None) -> bool:
        return cost is not None and all(
            getattr(cost, field.name) <= getattr(self, field.name) for field in dataclasses.fields(self)
        )


@dataclass(frozen=True)
class Found:
    """A candidate, how far it came, and what it takes."""

    arch: str
    rung: int  # counted from 1
    score: float
    margin: float | None
    cost: Cost


def candidates(mixers: Sequence[str], channels: Sequence[str], blocks: int) -> list[str]:
    """Every sequence of so many mixers, each followed by the same channel mixer, for each channel mixer."""
    patterns = itertools.product(channels, itertools.product(mixers, repeat=blocks))
    return [str(parse(" ".join(f"{mixer} {channel}" for mixer in pattern))) for channel, pattern in patterns]


def affordable(archs: Sequence[str], protocol: Protocol, budget: Budget, most: int, seed: int) -> dict[str, Cost]:
    """The candidates within the budget; `most` of them at random where there are more.

    Raises:
        ValueError: there is none, or one cannot be trained.
    """
    runs = _first_runs(archs, protocol)
    check(runs)
    costs = {run.arch: cost_of(run) for run in runs}
    within = {arch: cost for arch, cost in costs.items() if cost is not None and budget.allows(cost)}
    if not within:
        raise ValueError(f"none of {len(archs)} candidates is within the budget")
    chosen = random.Random(seed).sample(sorted(within), min(most, len(within)))
    return {arch: within[arch] for arch in chosen}


def _first_runs(archs: Sequence[str], protocol: Protocol) -> list[Run]:
    setting = next(iter(protocol.settings.values()))[0]
    return [Run(arch, setting, protocol.trainings_of(setting.name)[0]) for arch in archs]


def rungs(protocol: Protocol, count: int) -> list[Protocol]:
    """The protocol cut down, from one setting per task and one seed to the whole of it: as many steps as halving `count`
    candidates takes."""
    steps = max(math.ceil(math.log(max(count, 2), KEEP)), 1)
    cut = []
    for step in range(steps):
        share = KEEP ** (step + 1 - steps)
        settings = {task: all_of[: max(1, round(share * len(all_of)))] for task, all_of in protocol.settings.items()}
        seeds = protocol.seeds[: max(1, round(share * len(protocol.seeds)))]
        cut.append(dataclasses.replace(protocol, settings=settings, seeds=seeds))
    return cut


def foreseen(costs: dict[str, Cost], protocol: Protocol) -> list[Run]:
    """The runs of a search in which the candidates of most FLOPs go on: as many as there will be, and the dearest."""
    alive = sorted(costs, key=lambda arch: -costs[arch].flops)
    runs = dict[Run, None]()
    for cut in rungs(protocol, len(costs)):
        runs |= dict.fromkeys(plan(cut, alive))
        alive = alive[: max(1, math.ceil(len(alive) / KEEP))]
    return list(runs)


def search(
    costs: dict[str, Cost],
    protocol: Protocol,
    store: Store,
    engine: Engine,
    progress_of: Callable[[int, list[Run]], Progress],
    *,
    together: bool = False,
) -> list[Found]:
    """The candidates, those that came furthest first, then by score.

    Args:
        costs: of the candidates, by architecture.
        protocol, store, engine, together: as of a sweep.
        progress_of: the progress of a rung, from its number and its runs.
    """
    alive, found = list(costs), dict[str, Found]()
    for number, cut in enumerate(rungs(protocol, len(costs)), 1):
        runs = plan(cut, alive)
        sweep(runs, store, progress_of(number, runs), engine=engine, together=together)
        metrics = store.metrics()
        by_arch = scores([(run, metrics.get(run.key())) for run in runs], cut.score)
        for arch in alive:
            score = mad_score(by_arch[arch])
            if score.value is not None:
                found[arch] = Found(arch, number, score.value, score.margin, costs[arch])
        ranked = sorted((arch for arch in alive if arch in found), key=lambda arch: -found[arch].score)
        alive = ranked[: max(1, math.ceil(len(ranked) / KEEP))]
    return sorted(found.values(), key=lambda f: (-f.rung, -f.score))


def pareto(found: Sequence[Found]) -> set[str]:
    """The candidates that, among those that came furthest, no other beats in score, state, parameters and FLOPs at once."""
    furthest = max((f.rung for f in found), default=0)
    last = [f for f in found if f.rung == furthest]

    def beats(a: Found, b: Found) -> bool:
        no_worse = a.score >= b.score and all(x <= y for x, y in zip(_takes(a), _takes(b), strict=True))
        return no_worse and (a.score, _takes(a)) != (b.score, _takes(b))

    return {f.arch for f in last if not any(beats(other, f) for other in last)}


def _takes(f: Found) -> tuple[float, ...]:
    return f.cost.state, f.cost.parameters, f.cost.flops
