"""More seeds where architectures cannot be told apart: in each round one for every architecture whose interval overlaps with
that of a neighbour in the ranking.

Rounds follow from the results of those before alone, so a sweep that was killed comes to the same runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from madkernels.synthetics.protocol import Run, Score, mad_score, scores


def more_seeds(runs: list[Run], metrics: Mapping[str, dict[str, Any]], measure: str, most: int) -> list[Run]:
    """The runs of the next round: none where all are apart, or have `most` seeds.

    Args:
        runs: of the rounds so far.
        metrics: of the runs that are done, by key.
        measure: the protocol's score.
    """
    by_arch = scores([(run, metrics.get(run.key())) for run in runs], measure)
    not_apart = overlapping({arch: mad_score(by_task) for arch, by_task in by_arch.items()})
    more = dict[Run, None]()
    for arch in by_arch:
        own = [run for run in runs if run.arch == arch]
        seeds = {run.training.seed for run in own}
        if arch in not_apart and len(seeds) < most:
            another = max(seeds) + 1
            more |= dict.fromkeys(
                dataclasses.replace(run, training=dataclasses.replace(run.training, seed=another)) for run in own
            )
    return list(more)


def overlapping(by_arch: Mapping[str, Score]) -> set[str]:
    """The architectures whose interval overlaps with that of a neighbour in the ranking. One without a score has no place in
    it; one without an interval, for want of seeds, overlaps with its neighbours."""
    ranked = sorted(((score.value, arch) for arch, score in by_arch.items() if score.value is not None), reverse=True)
    found = set[str]()
    for (better, one), (worse, other) in pairwise(ranked):
        margins = by_arch[one].margin, by_arch[other].margin
        if None in margins or better - worse <= sum(m for m in margins if m is not None):
            found |= {one, other}
    return found
