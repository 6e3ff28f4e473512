"""Measures an op beside its peers.

First a gate: every contender runs once on the timed inputs, and is compared with the float64 reference. One that is wrong
is not timed. Then rounds: in each, every contender runs once, on the next copy of the inputs, so that none finds them in
cache. All share the machine's ups and downs, and the order moves on, so that none always has the same one before it.
Warm rounds have one copy, and of two runs of a contender one after the other they time the second.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from madkernels.benchmarks import gpu
from madkernels.benchmarks.cases import Case, Inputs
from madkernels.benchmarks.gate import TOLERANCES, Function, Gate, gradients, output, with_graph
from madkernels.benchmarks.machine import Rates, last_level_cache
from madkernels.benchmarks.sizes import Size

CPU = torch.device("cpu")
PASSES = ("forward", "backward")
OURS = "madkernels"
MAX_COPIES = 32
SEVERAL = 4  # times the last-level cache, beyond which inputs drive themselves out of it
MIN_RUNS = 5
SECONDS = 3.0  # spent on a contender before it drops out of the rounds


@dataclass(frozen=True)
class Peer:
    """Another way to compute an op, with the op's signature.

    `backward`: whether autograd follows it at a cost worth timing. `channel_first`: it is given (batch, dim, seqlen) memory
    behind its (batch, seqlen, dim) views. `auto`: it runs without being asked for. `needs`: "module:name" that has to be
    installed. `devices`: what it runs on.
    """

    name: str
    function: Function
    backward: bool = False
    channel_first: bool = False
    auto: bool = True
    needs: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    accepts: Callable[[Case], bool] = lambda case: True

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.needs is None:
            return None
        module, _, name = self.needs.partition(":")
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError as error:
            return f"{package} does not import: {error}"
        return None if found else f"the installed {package} has no {name}"


@dataclass(frozen=True)
class Benchmark:
    """An op, its cases and its peers."""

    name: str
    function: Function
    reference: Function
    cases: tuple[Case, ...]
    training: Case  # the sizes that its page states an expected time on a GPU for
    peers: tuple[Peer, ...]
    of_model: Callable[[Size], Case] | None = None  # the call in a model of a size


def benchmark_of(op: str) -> Benchmark:
    """The benchmark of an op, by its name."""
    found: Benchmark = importlib.import_module(f"madkernels.benchmarks.{op}").BENCHMARK
    return found


@dataclass
class Result:
    """One contender, dtype and pass. Seconds of each run; none where the gate refused it."""

    contender: str
    dtype: str
    direction: str  # "forward" or "backward"
    error: float  # relative RMS against float64; of the worst gradient in the backward
    tolerance: float
    seconds: list[float] = field(default_factory=list)
    memory: int = 0  # peak bytes, where the case tells it: of the forward, or of the forward and backward

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> list[float]:
        """Lower quartile, median, upper quartile, in seconds."""
        if len(self.seconds) == 1:
            return self.seconds * 3
        return statistics.quantiles(self.seconds, n=4, method="inclusive")

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance


@dataclass
class Measured:
    """What one case gave. The bytes are by dtype."""

    case: Case
    absent: dict[str, str]  # peers that did not run, and why
    rates: Rates | gpu.Rates
    results: list[Result] = field(default_factory=list)
    checked: str = ""  # how much the gate compared
    copies: dict[str, int] = field(default_factory=dict)  # how many, not bytes
    cold: bool = True  # whether between two turns of a copy more bytes pass than the last cache holds
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)  # bytes each pass must move
    memory: dict[str, int] = field(default_factory=dict)  # peak of a forward and backward
    op: str = ""  # or layer, or model

    def add_sizes(self, dtype: str, inputs: Inputs, copies: list[Inputs]) -> None:
        """Notes what follows from the inputs, which have the gradient of the output as `out`."""
        total = sum(value.nbytes for value in inputs.values())
        self.copies[dtype] = len(copies)
        self.cold = self.cold and total * max(len(copies) - 1, 1) > cache_bytes(inputs)
        # Forward: inputs and output once. Backward: these and the gradient of each input.
        self.traffic[dtype] = {"forward": total, "backward": 2 * total - inputs["out"].nbytes}

    def intensity(self, dtype: str, direction: str) -> float:
        """Floating-point operations of a pass over the bytes that it must move."""
        return self.case.arithmetic(direction) / self.traffic[dtype][direction]

    def floor(self, dtype: str, direction: str) -> dict[str, float]:
        """Seconds that products, exponentials and memory traffic each take at the least, at the median rates of the run."""
        operations = self.case.flops(direction)
        return {
            "multiply": operations / statistics.median(self.rates.multiply[dtype]) if operations else 0.0,
            "exp2": self.case.exponentials / statistics.median(self.rates.exp2),
            "memory": self.traffic[dtype][direction] / statistics.median(self.rates.copy),
        }


@dataclass
class Contender:
    """A function on its copies of the inputs, in one pass."""

    function: Function
    copies: list[Inputs]  # each with the gradient of the output as `out`
    backward: bool
    channel_first: bool
    result: Result
    warm: bool = False
    runs: int = 0

    def run(self) -> float:
        """Seconds of one run on the next copy."""
        inputs = self.copies[self.runs % len(self.copies)]
        self.runs += 1
        if self.warm:
            self.run_on(inputs)
        return self.run_on(inputs)

    def peak_memory(self) -> int:
        """Peak bytes of a second run, on the first copy: the first may compile, and makes what stays."""
        self.run_on(self.copies[0])
        return peak_bytes(partial(gradients if self.backward else output, self.function, self.copies[0]), self.copies[0])

    def run_on(self, inputs: Inputs) -> float:
        if not self.backward:
            return seconds_of(lambda: output(self.function, inputs), device_of(inputs))
        leaves, out = with_graph(self.function, inputs)
        return seconds_of(lambda: torch.autograd.grad(out, list(leaves.values()), inputs["out"]), device_of(inputs))


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, without those of freeing what it returns."""
    if device.type == "cuda":
        return gpu.seconds(call)
    begin = time.perf_counter()
    out = call()
    elapsed = time.perf_counter() - begin
    del out
    return elapsed


def device_of(inputs: Inputs) -> torch.device:
    """The device that the inputs are on."""
    return next(iter(inputs.values())).device


def cache_bytes(inputs: Inputs) -> int:
    """The size of the last cache before the memory that the inputs are in."""
    device = device_of(inputs)
    return gpu.l2_bytes(device) if device.type == "cuda" else last_level_cache()


def channels_first(value: Tensor) -> Tensor:
    """The same values, rows laid out as (batch, dim, seqlen) in memory."""
    return value.transpose(1, 2).contiguous().transpose(1, 2) if value.dim() == 3 else value


def peak_memory(function: Function, inputs: Inputs) -> int:
    """Peak bytes of a forward and backward."""
    return peak_bytes(partial(gradients, function, inputs), inputs)


def peak_bytes(call: Callable[[], Any], inputs: Inputs) -> int:
    """Peak bytes of a call: the inputs, the gradient of the output, and all that torch's allocator gave out and had not got
    back, to C++ as well as to Python. Memory taken from elsewhere would not be seen; the ops take none."""
    held = sum(value.nbytes for value in inputs.values())
    if device_of(inputs).type == "cuda":
        return held + gpu.peak_memory(call)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports its start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        found = call()
        del found
    profiler: Any = trace.profiler
    events = profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    given = peak = 0
    for _, change in changes:
        given += change
        peak = max(peak, given)
    return peak + held


def rotated(inputs: Inputs) -> list[Inputs]:
    """Enough copies that between two turns of one the others fill the last-level cache; at most MAX_COPIES. Of what is
    several times as large as the cache, the inputs alone: the cache holds a small part of them."""
    size, cache = sum(value.nbytes for value in inputs.values()), cache_bytes(inputs)
    count = 1 if size > SEVERAL * cache else min(2 + cache // size, MAX_COPIES)
    return [inputs, *({name: value.clone() for name, value in inputs.items()} for _ in range(count - 1))]


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The inputs of a case, and as `out` a gradient of its output."""
    inputs = case.make_inputs(dtype)
    shape = [getattr(case, axis) for axis in case.axes["out"]]
    inputs["out"] = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {key: value.to(device) for key, value in inputs.items()}


def gate_of(benchmark: Benchmark, case: Case, dtype: torch.dtype, inputs: Inputs) -> Gate:
    """The gate on the timed inputs, or on those of the case that stands for them."""
    stand_in, checked, device = case.checked_as, "all of it", device_of(inputs)
    if stand_in != case:
        inputs, checked = inputs_of(stand_in, dtype, device), str(stand_in)
    return Gate(stand_in, partial(benchmark.reference, **stand_in.options_on(device)), inputs, checked)


def too_slow(
    case: Case, dtype: torch.dtype, backward: bool, peers: Sequence[Peer], device: torch.device, limit: float
) -> dict[str, str]:
    """Peers of which a call takes more than `limit` seconds, and how many, from the time of a shorter one."""
    short = case.shortened()
    times, inputs, options = case.work() / short.work(), inputs_of(short, dtype, device), short.options_on(device)
    found = {}
    for peer in peers:
        call = partial(gradients if backward and peer.backward else output, partial(peer.function, **options), inputs)
        try:
            seconds = times * min(seconds_of(call, device) for _ in range(2))  # the first may compile
        except RuntimeError:
            continue  # the gate will say why
        if seconds > limit:
            found[peer.name] = f"skipped: about {seconds:.0f} s a call"
    return found


def contenders(
    benchmark: Benchmark, case: Case, dtype: torch.dtype, passes: Sequence[str], peers: Sequence[Peer], gate: Gate,
    absent: dict[str, str],
) -> Iterator[Contender]:  # fmt: skip
    """The op and its peers in each pass, gated; their copies are not there yet. Adds peers that do not fit to `absent`."""
    ours = Peer(OURS, benchmark.function, backward=True)
    device = device_of(gate.inputs)
    tolerance = case.leeway * TOLERANCES[dtype]
    options, checked_options = case.options_on(device), case.checked_as.options_on(device)
    for peer in (ours, *peers):
        function, checked = partial(peer.function, **options), partial(peer.function, **checked_options)
        backward = peer.backward and "backward" in passes
        try:
            errors = gate.errors(checked, backward, channels_first if peer.channel_first else torch.clone)
        except RuntimeError as refused:
            if peer is ours:
                raise
            absent[peer.name] = refusal(refused, dtype)
            continue
        for direction, error in zip(PASSES, errors, strict=False):
            if direction in passes:
                result = Result(peer.name, str(dtype).removeprefix("torch."), direction, error, tolerance)
                yield Contender(function, [], direction == "backward", peer.channel_first, result)


def refusal(error: RuntimeError, dtype: torch.dtype) -> str:
    """Why a peer did not take the inputs, in its own words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit into the memory of the GPU"
    first = str(error).strip().partition("\n")[0]
    return f"does not take these inputs in {str(dtype).removeprefix('torch.')}: {first}"


def run_rounds(runners: Sequence[Contender], rates: Rates | gpu.Rates, runs: int) -> None:
    """Times contenders in turn until each has had its share; the machine's rates as well, every round."""
    waiting = list(runners)
    for done in range(runs):
        rates.measure()
        first = done % len(waiting) if waiting else 0
        for runner in waiting[first:] + waiting[:first]:
            runner.result.seconds.append(runner.run())
        waiting = [r for r in waiting if len(r.result.seconds) < MIN_RUNS or sum(r.result.seconds) < SECONDS]
        if not waiting and len(rates.copy) >= MIN_RUNS:
            return


def measure(
    benchmark: Benchmark, case: Case, dtypes: Sequence[torch.dtype], passes: Sequence[str], peers: Sequence[Peer],
    runs: int = 30, device: torch.device = CPU, warm: bool = False, limit: float | None = None,
) -> Measured:  # fmt: skip
    """Gates and times the op and the peers given on one case, each at most `runs` times; where `warm`, on inputs
    that are in cache. Peers are left out of which a call is estimated to take more than `limit` seconds. All dtypes share
    the rounds."""
    absent = {peer.name: why for peer in peers if (why := peer.missing())}
    absent |= {peer.name: f"does not run on {device.type}" for peer in peers if device.type not in peer.devices}
    absent |= {peer.name: "does not take this case" for peer in peers if not peer.accepts(case)}
    present = [peer for peer in peers if peer.name not in absent]
    if limit is not None:
        absent |= too_slow(case, dtypes[0], "backward" in passes, present, device, limit)
        present = [peer for peer in present if peer.name not in absent]
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    rates = gpu.Rates(device, names) if device.type == "cuda" else Rates(names)
    measured = Measured(case, absent, rates, op=benchmark.name)
    runners: list[Contender] = []
    for name, dtype in zip(names, dtypes, strict=True):
        inputs = inputs_of(case, dtype, device)
        gate = gate_of(benchmark, case, dtype, inputs)
        measured.checked = gate.checked
        mine = list(contenders(benchmark, case, dtype, passes, present, gate, absent))
        measured.results += [runner.result for runner in mine]
        mine = [runner for runner in mine if runner.result.right]
        del gate
        copies = rotated(inputs) if case.rotates and not warm else [inputs]
        turned: list[Inputs] = []
        if any(runner.channel_first for runner in mine):
            turned = [{key: channels_first(value) for key, value in copy.items()} for copy in copies]
        for runner in mine:
            runner.copies, runner.warm = turned if runner.channel_first else copies, warm
            if case.tells_memory:
                runner.result.memory = runner.peak_memory()
        runners += mine
        measured.add_sizes(name, inputs, copies)
        if "backward" in passes and not case.tells_memory:
            measured.memory[name] = peak_memory(partial(benchmark.function, **case.options_on(device)), inputs)
    run_rounds(runners, measured.rates, runs)
    return measured
