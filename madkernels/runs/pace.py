"""How much work runs are, before they start, and how long they will take at the pace of this machine.

The pace of an architecture is its FLOPs per second over a few optimizer steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SECONDS = 1.0  # for all measurements together
DEAREST = 2e10  # FLOPs: no larger step is tried, since one alone would take longer than that

Trial = Callable[[], float]  # does an optimizer step and returns its FLOPs


def amount(work: Mapping[Any, float], workers: int | None, *, threads: int = 1) -> str:
    """In words: tokens, FLOPs, and the time on so many processes here.

    Args:
        work: FLOPs of each run.
        workers: processes on this machine's CPU; None where runs are trained elsewhere, so that the time is not known.
        threads: of each process.
    """
    told = f"{sum(run.tokens for run in work):.3g} tokens, {sum(work.values()):.3g} FLOPs"
    seconds = None if workers is None else foreseen(work, workers, threads)
    if workers is None or seconds is None:
        return told
    return f"{told}, about {duration(seconds)}{f' on {workers} processes' if workers > 1 else ''}"


def foreseen(work: Mapping[Any, float], workers: int, threads: int = 1) -> float | None:
    """Seconds that runs take; None where no pace could be measured."""
    largest = {run.arch: run for run in sorted(work, key=lambda run: work[run])}  # of each architecture
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        paces, until = dict[str, float](), time.perf_counter() + SECONDS
        for arch, run in reversed(largest.items()):
            if time.perf_counter() < until and (pace := pace_of(run, SECONDS / len(largest))):
                paces[arch] = pace
    finally:
        torch.set_num_threads(before)
    if not paces:
        return None
    typical = len(paces) / sum(1 / pace for pace in paces.values())
    seconds = [flops / paces.get(run.arch, typical) for run, flops in work.items()]
    return max(sum(seconds) / workers, *seconds)


def pace_of(run: Any, seconds: float) -> float | None:
    """FLOPs per second of a run's steps; None where one is too large to be tried, or fails: the run itself says why."""
    try:
        step: Trial | None = run.trial(DEAREST)
        if step is None:
            return None
        step()  # the first one also sets up what later ones find there
        begun = time.perf_counter()
        done = step()
        while (passed := time.perf_counter() - begun) < seconds:
            done += step()
        return done / passed
    except Exception:
        return None


def trial_of(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, flops: float) -> Trial:
    """Steps on a loss () that is computed anew each time."""

    def step() -> float:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return flops

    return step


def duration(seconds: float) -> str:
    """In words, of two units at most."""
    if seconds < 99.5:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if hours < 10 else f"{hours} h"
    return f"{hours / 24:,.0f} days"
