"""Another run, to which this one is compared: a JSON file that `madkernels bench --json` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from madkernels.benchmarks.cases import Case
from madkernels.benchmarks.harness import OURS, Measured, Result

SAME = ("gpu", "cpu", "threads")  # facts of the machine that have to agree; without a GPU, neither run names one

Spread = tuple[float, float, float]  # lower quartile, median, upper quartile, in seconds


class Baseline:
    """The spreads of a run's timings, by what was timed.

    Raises:
        ValueError: the file is none of a benchmark, of another device, or has none of the cases.
    """

    def __init__(self, path: Path, machine: Mapping[str, str], wanted: Sequence[tuple[str, Case]]):
        self.path = path
        try:
            record = json.loads(path.read_text())
            cases, there = record["cases"], record["machine"]
            named = [(case.get("op", record["op"]), case["case"], case["results"]) for case in cases]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--baseline {path}: not a file of madkernels bench --json: {error!r}") from None
        for fact in SAME if "gpu" in machine or "gpu" in there else SAME[1:]:
            if there.get(fact) != machine.get(fact):
                raise ValueError(f"--baseline {path}: {fact} is {there.get(fact)} there, {machine.get(fact)} here")
        self.spreads: dict[tuple[str, str, str, str, str], Spread] = {}
        for op, case, results in named:
            for r in results:
                if r["seconds"]:
                    key = (op, _told(case), r["contender"], r["dtype"], r["direction"])
                    self.spreads[key] = r["lower_quartile"], r["median"], r["upper_quartile"]
        known = {key[:2] for key in self.spreads}
        if not any((op, _told(asdict(case))) in known for op, case in wanted):
            told = ", ".join(dict.fromkeys(f"{op} {case['name']}" for op, case, _ in named)) or "none"
            raise ValueError(f"--baseline {path}: it has none of the cases; its cases are {told}")

    def of(self, measured: Measured, result: Result) -> Spread | None:
        """What the other run has for a result."""
        told = _told(asdict(measured.case))
        return self.spreads.get((measured.op, told, result.contender, result.dtype, result.direction))

    def regressions(self, measured: Measured) -> list[str]:
        """The passes of ours whose quartiles lie wholly above those of the other run."""
        found = []
        for result in measured.results:
            spread = self.of(measured, result) if result.contender == OURS and result.seconds else None
            if spread and result.quartiles[0] > spread[2]:
                called = measured.case.called.get(result.direction, result.direction)
                times = f"{result.median / spread[1]:.2f} times the baseline"
                found.append(f"{measured.op} {measured.case.name}, {result.dtype} {called}: {times}")
        return found


def _told(case: Mapping[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)
