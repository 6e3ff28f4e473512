"""Search by successive halving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.runs.engines import Job, Listener
from madkernels.runs.store import Store
from madkernels.synthetics import search
from madkernels.synthetics.protocol import Protocol, Run, Training, load_protocol
from madkernels.synthetics.report import Cost
from madkernels.synthetics.search import Budget, Found, affordable, candidates, pareto, rungs
from madkernels.synthetics.tasks.recall import Recall


def quality(arch: str) -> float:
    return 0.2 + 0.2 * arch.count("attention") + 0.1 * arch.count("mamba")


class Oracle:
    """An engine that trains nothing."""

    def __init__(self) -> None:
        self.done: list[Run] = []

    def run(self, jobs: list[Job], listener: Listener) -> None:
        for job in jobs:
            for run in job:
                self.done.append(run)
                accuracy = quality(run.arch)
                listener.ended(run, {"accuracy": accuracy, "held_out_accuracy": accuracy, "seconds": 1.0, "curve": []})


class Silent:
    def run_starts(self, run: Run) -> None: ...
    def point(self, run: Run, epoch: int, point: dict[str, float]) -> None: ...
    def run_ends(self, run: Run, outcome: str) -> None: ...


@pytest.fixture
def protocol() -> Protocol:
    tasks = {"recall": tuple(Recall(8, length, 64) for length in (8, 10, 12, 14, 16, 18, 20, 22, 24))}
    return Protocol("p", "", tasks, (Training(lr=1e-3, epochs=1, dim=16, held_out=8),), (1, 2, 3), "accuracy")


def test_candidates_are_all_patterns() -> None:
    found = candidates(["mamba", "attention:heads=2"], ["swiglu", "moe"], 2)
    assert len(found) == len(set(found)) == 8
    assert "mamba moe attention:heads=2 moe" in found


def test_budgets(protocol: Protocol) -> None:
    found = candidates(["mamba", "attention:heads=2"], ["swiglu", "moe"], 2)
    costs = affordable(found, protocol, Budget(), 100, 0)
    least = min(cost.flops for cost in costs.values())
    assert set(affordable(found, protocol, Budget(flops=least), 100, 0)) < set(costs)
    assert len(affordable(found, protocol, Budget(), 3, 0)) == 3
    with pytest.raises(ValueError, match="none of 8 candidates is within the budget"):
        affordable(found, protocol, Budget(parameters=10), 100, 0)


def test_rungs_grow_to_the_whole_protocol(protocol: Protocol) -> None:
    sizes = [(len(cut.settings["recall"]), len(cut.seeds)) for cut in rungs(protocol, 27)]
    assert sizes == [(1, 1), (3, 1), (9, 3)]
    assert rungs(protocol, 1) == [protocol]


def test_the_best_comes_through_and_little_is_spent(protocol: Protocol, tmp_path: Path) -> None:
    found = candidates(["mamba", "attention:heads=2", "hyena"], ["swiglu"], 3)
    costs = affordable(found, protocol, Budget(), 27, 0)
    oracle, store = Oracle(), Store(tmp_path)
    ranked = search.search(costs, protocol, store, oracle, lambda *_: Silent())
    store.close()
    assert len(ranked) == 27
    assert ranked[0].arch == max(costs, key=quality)
    assert [f.rung for f in ranked] == [3] * 3 + [2] * 6 + [1] * 18
    assert len(oracle.done) == len(set(oracle.done)) == 27 + 9 * 2 + 3 * 24  # of 27 * 27


def test_pareto() -> None:
    def one(arch: str, score: float, state: int, flops: float, rung: int = 2) -> Found:
        return Found(arch, rung, score, None, Cost(10, state, flops))

    found = [one("a", 0.9, 10, 10), one("b", 0.8, 5, 10), one("c", 0.8, 10, 10), one("e", 0.9, 10, 10)]
    found.append(one("d", 0.1, 1, 1, rung=1))
    assert pareto(found) == {"a", "b", "e"}
    assert pareto([]) == set()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("madkernels.cli.mad.engine_of", lambda *_: Oracle())
    arguments = ["mad", "search", "--mixers", "mamba,attention:heads=4", "--channels", "swiglu", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "4 of 4 candidates" in result.output
    lines: list[Any] = [
        line for line in result.output.splitlines() if "│ attention:heads=4 swiglu attention:heads=4" in line
    ]
    assert "60.0" in lines[0]
    assert "│ * │" in lines[0]
    assert len(load_protocol("demo").settings) == 6
