"""Where the time of a MAD training step goes, on the CPU: per architecture, against the least that it could take.

    floor = training FLOPs, as the layers count them, at the rate of multiplying
          + 28 bytes a parameter at the rate of copying

The bytes are those of the optimizer: AdamW reads parameter, gradient and two moments, and writes all but the gradient. The
rates are measured in the same run, in turn with the steps.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from madkernels.benchmarks.harness import CPU, seconds_of
from madkernels.benchmarks.machine import Rates
from madkernels.models import HybridLM, counting
from madkernels.models.init import parameter_groups
from madkernels.reporting.tables import Table
from madkernels.synthetics.protocol import Training
from madkernels.synthetics.train import BETAS, step

ARCHITECTURES = {
    "transformer": "2*(attention:heads=4 swiglu)",
    "mamba": "4*mamba:dstate=8",
    "hyena": "2*(hyena:order=8 swiglu)",
    "mh-hyena": "2*(mh-hyena:heads=8,order=4 swiglu)",
    "striped-hyena": "hyena:order=8 swiglu attention:heads=4 swiglu",
    "striped-hyena-moe": "hyena:order=8 moe attention:heads=4 moe",
    "deltanet": "2*(deltanet swiglu)",
    "gla": "2*(gated-linear-attention swiglu)",
    "rwkv6": "2*(rwkv6-time-mixer rwkv-channel-mixer)",
    "mamba2": "4*mamba2:dstate=16",
}
DIM, BATCH, SEQLEN, VOCAB_SIZE = 128, 32, 128, 32
OPTIMIZER_BYTES = 28  # a parameter
WARM_UP, PROFILED = 3, 3  # steps
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::"),
    "ops": ("madkernels::", "GeneratedBackwardFor_madkernels"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index", "aten::repeat", "aten::flip"),
    "optimizer": ("Optimizer", "aten::_fused_adamw_"),
    "elementwise": ("aten::",),  # and sums
}
REST = "rest"  # autograd and Python


@dataclass
class Step:
    """The training step of an architecture in a dtype; the seconds of each run."""

    name: str
    arch: str
    dtype: str
    run: Callable[[], Any]
    flops: float
    params: int
    seconds: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)  # of the time, by kind

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def floor(self, rates: Rates) -> float:
        """Seconds that it takes at the least."""
        products = self.flops / statistics.median(rates.multiply[self.dtype])
        return products + OPTIMIZER_BYTES * self.params / statistics.median(rates.copy)


def steps_of(names: Sequence[str], dtypes: Sequence[str], batch: int = BATCH, seqlen: int = SEQLEN) -> list[Step]:
    """Of architectures by name, or by their strings, in each dtype."""
    return [_step_of(name, ARCHITECTURES.get(name, name), dtype, batch, seqlen) for name in names for dtype in dtypes]


def _step_of(name: str, arch: str, dtype: str, batch: int, seqlen: int) -> Step:
    torch.manual_seed(0)
    model = HybridLM(arch, vocab_size=VOCAB_SIZE, dim=DIM)
    options = Training(lr=1e-4, dtype=dtype)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=options.lr, betas=BETAS, fused=True)
    inputs, targets = torch.randint(VOCAB_SIZE, (2, batch, seqlen))

    def run() -> None:
        loss = step(model, inputs, targets, options)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    flops = counting.training_flops(model, seqlen) * batch * seqlen
    return Step(name, arch, dtype, run, flops, counting.params(model))


def measure(steps: Sequence[Step], runs: int) -> Rates:
    """Times the steps in turn, then profiles each. Returns the rates of the machine, measured before each round."""
    rates = Rates(sorted({each.dtype for each in steps}))
    for each, _ in itertools.product(steps, range(WARM_UP)):
        each.run()
    for _ in range(runs):
        rates.measure()
        for each in steps:
            each.seconds.append(seconds_of(each.run, CPU))
    for each in steps:
        each.shares = shares_of(each.run)
    return rates


def shares_of(run: Callable[[], Any]) -> dict[str, float]:
    """The share of a run's time that each kind of operator takes, of the profiler's self times."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports its start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        whole = seconds_of(lambda: [run() for _ in range(PROFILED)], CPU)
    found = dict.fromkeys((*KINDS, REST), 0.0)
    for event in trace.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / whole
    found[REST] += max(1 - sum(found.values()), 0.0)
    return found


def kind_of(operator: str) -> str:
    """The kind of an operator, by its name in a profile: the first whose names begin it."""
    return next((kind for kind, begins in KINDS.items() if operator.startswith(begins)), REST)


def table(steps: Sequence[Step], rates: Rates) -> Table:
    """A row a step: milliseconds, those of each kind, and the floor."""
    kinds = (*KINDS, REST)
    shown = Table("", "dtype", "ms", *kinds, "floor", "of floor", "FLOPs", spare=("FLOPs",), box=None, title_justify="left")
    shown.title = f"Training step, {DIM} wide, in ms"
    for each in steps:
        parts = [f"{1e3 * each.median * each.shares[kind]:.1f}" for kind in kinds]
        floor = each.floor(rates)
        row = [each.name, each.dtype, f"{1e3 * each.median:.1f}", *parts, f"{1e3 * floor:.1f}", f"{floor / each.median:.0%}"]
        shown.add_row(*row, f"{each.flops:.3g}")
    return shown


def means(steps: Sequence[Step]) -> dict[str, float]:
    """The geometric mean of the medians of each dtype, in seconds."""
    dtypes = dict.fromkeys(each.dtype for each in steps)
    return {d: statistics.geometric_mean(each.median for each in steps if each.dtype == d) for d in dtypes}


def record(machine: Mapping[str, str], steps: Sequence[Step], rates: Rates) -> dict[str, Any]:
    """All that was measured, as it stands in a JSON file: `machine`, `rates`, and of each of `steps` name, architecture,
    dtype, `seconds` of each run, `floor_seconds`, `flops`, `params` and `shares`."""
    fields = ("name", "arch", "dtype", "flops", "params", "seconds", "shares")
    found = [{name: getattr(each, name) for name in fields} | {"floor_seconds": each.floor(rates)} for each in steps]
    measured = {"multiply_per_second": rates.multiply, "copy_bytes_per_second": rates.copy}
    return {"machine": dict(machine), "rates": measured, "steps": found}
