"""Rounds, copies, floors, memory."""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from fakes import FixedRates
from rich.console import Console
from torch import Tensor

from madkernels import _C, OPS
from madkernels.benchmarks import harness, machine, report
from madkernels.benchmarks.attention import BENCHMARK as ATTENTION
from madkernels.benchmarks.causal_conv import BENCHMARK as CONV, ConvCase
from madkernels.benchmarks.harness import (
    MIN_RUNS,
    SECONDS,
    Benchmark,
    Contender,
    Measured,
    Peer,
    Result,
    benchmark_of,
    channels_first,
    measure,
    peak_memory,
    rotated,
    run_rounds,
)
from madkernels.benchmarks.selective_scan import ScanCase

CASE = ConvCase(name="some", batch=2, seqlen=20, dim=8, width=3)


@dataclass
class Timed:
    """A contender that says how long it took, and writes down its turn."""

    result: Result
    takes: float
    turns: list[str]

    def run(self) -> float:
        self.turns.append(self.result.contender)
        return self.takes


def timed(name: str, takes: float, turns: list[str]) -> Contender:
    runner = Timed(Result(name, "float32", "forward", 0.0, 1e-5), takes, turns)
    return runner  # type: ignore[return-value]


def test_rounds_interleave_and_move_on() -> None:
    turns: list[str] = []
    runners = [timed(name, 1e-3, turns) for name in "abc"]
    run_rounds(runners, FixedRates(), 4)  # type: ignore[arg-type]
    assert "".join(turns) == "abc" + "bca" + "cab" + "abc"
    assert [len(r.result.seconds) for r in runners] == [4, 4, 4]


def test_slow_contenders_leave_after_their_share() -> None:
    turns: list[str] = []
    slow, fast = timed("slow", SECONDS, turns), timed("fast", 1e-3, turns)
    rates = FixedRates()
    run_rounds([slow, fast], rates, 12)  # type: ignore[arg-type]
    assert (len(slow.result.seconds), len(fast.result.seconds)) == (MIN_RUNS, 12)
    assert len(rates.exp2) == len(rates.copy) == 12


def test_copies_fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "last_level_cache", lambda: 1000)
    inputs = {"x": torch.arange(100.0)}  # 400 bytes
    copies = rotated(inputs)
    assert len(copies) == 4  # after one, three others: 1200 bytes
    assert len({copy["x"].data_ptr() for copy in copies}) == 4
    assert all(torch.equal(copy["x"], inputs["x"]) for copy in copies)
    assert len(rotated({"x": torch.zeros(1)})) == harness.MAX_COPIES
    assert len(rotated({"x": torch.zeros(1001)})) == 1  # 4004 bytes


def test_contender_takes_the_copies_in_turn() -> None:
    seen: list[float] = []

    def function(x: Tensor) -> Tensor:
        seen.append(float(x.detach()[0]))
        return x * 2

    copies = [{"x": torch.full((3,), value), "out": torch.ones(3)} for value in (1.0, 2.0, 3.0)]
    for backward in (False, True):
        contender = Contender(function, copies, backward, False, Result("f", "float32", "forward", 0.0, 1.0))
        assert all(contender.run() > 0 for _ in range(4))
    assert seen == [1.0, 2.0, 3.0, 1.0] * 2


def test_a_warm_contender_runs_before_it_is_timed() -> None:
    calls: list[float] = []

    def slow_at_first(x: Tensor) -> Tensor:
        calls.append(float(x.detach()[0]))
        if len(calls) % 2:
            time.sleep(0.05)
        return x * 2

    copies = [{"x": torch.full((3,), value), "out": torch.ones(3)} for value in (1.0, 2.0)]
    contender = Contender(slow_at_first, copies, False, False, Result("f", "float32", "forward", 0.0, 1.0), warm=True)
    assert all(contender.run() < 0.05 for _ in range(2))
    assert calls == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("warm", [False, True])
def test_inputs_are_in_cache_where_they_are_to_be(warm: bool) -> None:
    case = ScanCase(name="some", batch=1, seqlen=64, dim=64, dstate=4)
    measured = measure(benchmark_of("selective_scan"), case, [torch.float32], ["forward"], [], runs=1, warm=warm)
    assert (measured.copies["float32"] == 1) is warm


def test_inputs_larger_than_the_cache_are_not_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "last_level_cache", lambda: 1000)
    case = ScanCase(name="some", batch=1, seqlen=64, dim=64, dstate=4)
    assert measure(benchmark_of("selective_scan"), case, [torch.float32], ["forward"], [], runs=1, warm=True).cold


def test_peak_memory_counts_what_is_held_at_once() -> None:
    inputs = {"x": torch.zeros(1 << 20), "out": torch.zeros(1 << 20)}  # 4 MiB each

    def frugal(x: Tensor) -> Tensor:
        return x * 2  # output, gradient

    def wasteful(x: Tensor) -> Tensor:
        big = torch.zeros(8 << 20)  # 32 MiB, given back before the backward
        return x * 2 + big[0]

    assert peak_memory(frugal, inputs) == pytest.approx(16 << 20, rel=0.01)
    # inputs 8, big 32, product 4, sum 4
    assert peak_memory(wasteful, inputs) == pytest.approx(48 << 20, rel=0.01)


def test_peak_memory_sees_the_extension() -> None:
    case = ScanCase(name="some", batch=1, seqlen=320, dim=64, dstate=16)
    inputs = case.make_inputs(torch.float32) | {"out": torch.zeros(1, 320, 64)}
    from madkernels import selective_scan

    rows = 320 * 64 * 4
    held = sum(value.nbytes for value in inputs.values())
    checkpoints = rows * 16 // 32
    peak = peak_memory(partial(selective_scan), inputs)
    assert peak >= held + rows + checkpoints + 2 * rows  # output, states that enter chunks, gradients of u and delta
    assert peak <= 3 * held


def test_floor() -> None:
    case = ScanCase(name="some", batch=2, seqlen=10, dim=8, dstate=4)
    inputs = case.make_inputs(torch.bfloat16) | {"out": torch.zeros(2, 10, 8, dtype=torch.bfloat16)}
    measured = Measured(case, {}, FixedRates())  # type: ignore[arg-type]
    measured.rates.measure()
    measured.add_sizes("bfloat16", inputs, [inputs])
    rows, projections, decays = 2 * 10 * 8 * 2, 2 * 10 * 4 * 2, 8 * 4 * 4
    forward = 3 * rows + 2 * projections + decays  # u, delta, out
    backward = 5 * rows + 4 * projections + 2 * decays  # u, delta, their gradients, that of out
    assert measured.traffic["bfloat16"] == {"forward": forward, "backward": backward}
    floor = measured.floor("bfloat16", "backward")
    exp2, memory = pytest.approx(2 * 10 * 8 * 4 / 1e9), pytest.approx(backward / 1e10)
    assert floor == {"multiply": 0.0, "exp2": exp2, "memory": memory}


def test_floor_of_products() -> None:
    case = next(case for case in ATTENTION.cases if case.name == "odd")
    measured = Measured(case, {}, FixedRates(["float32"]))  # type: ignore[arg-type]
    measured.rates.measure()
    measured.traffic = {"float32": {"forward": 1, "backward": 1}}
    pairs = 6 * 203 * 204 // 2
    floor = measured.floor("float32", "backward")
    assert floor["multiply"] == pytest.approx(2 * 5 * 59 * pairs / 1e11)
    assert floor["exp2"] == pytest.approx(pairs / 1e9)


def test_wrong_contender_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Rates", FixedRates)

    def off_by_one(x: Tensor, weight: Tensor, activation: str | None = None) -> Tensor:
        return torch.roll(x, 1, dims=1)

    right = next(peer for peer in CONV.peers if peer.name == "conv1d")
    benchmark = Benchmark(CONV.name, CONV.function, CONV.reference, (CASE,), CASE, ())
    peers = [right, Peer("off-by-one", off_by_one, backward=True), Peer("nowhere", off_by_one, needs="no_such_thing:f")]
    measured = measure(benchmark, CASE, [torch.float32], ["forward"], peers, runs=2)
    runs = {result.contender: len(result.seconds) for result in measured.results}
    assert runs == {"madkernels": 2, "conv1d": 2, "off-by-one": 0}
    assert measured.absent == {"nowhere": "no_such_thing is not installed"}
    assert not next(result for result in measured.results if result.contender == "off-by-one").right
    console = Console(file=io.StringIO(), width=100)
    report.show(measured, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"off-by-one +\d\.\de.\d\d +wrong +not +timed", text)
    assert "not run: nowhere: no_such_thing is not installed" in text


def test_peers_that_refuse_a_dtype_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Rates", FixedRates)

    def half_alone(x: Tensor, weight: Tensor, activation: str | None = None) -> Tensor:
        if x.dtype == torch.float32:
            raise RuntimeError("only bfloat16\nat line 7")
        return CONV.function(x, weight, activation=activation)

    peers = [Peer("half-alone", half_alone, backward=True)]
    measured = measure(CONV, CASE, [torch.float32, torch.bfloat16], ["forward"], peers, runs=1)
    assert measured.absent == {"half-alone": "does not take these inputs in float32: only bfloat16"}
    timed = {(result.contender, result.dtype) for result in measured.results if result.seconds}
    assert timed == {(harness.OURS, "float32"), (harness.OURS, "bfloat16"), ("half-alone", "bfloat16")}


def test_an_op_that_refuses_its_case_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Rates", FixedRates)

    def never(**inputs: Tensor) -> Tensor:
        raise RuntimeError("not today")

    benchmark = Benchmark(CONV.name, never, CONV.reference, (CASE,), CASE, ())
    with pytest.raises(RuntimeError, match="not today"):
        measure(benchmark, CASE, [torch.float32], ["forward"], [], runs=1)


def test_measures_dtypes_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Rates", FixedRates)
    passes = ["forward", "backward"]
    measured = measure(CONV, CASE, [torch.float32, torch.bfloat16], passes, CONV.peers, runs=1)
    found = {(r.contender, r.dtype, r.direction) for r in measured.results if len(r.seconds) == 1}
    names = ["madkernels", *(peer.name for peer in CONV.peers if "cpu" in peer.devices)]
    assert found == {(n, d, p) for n in names for d in ("float32", "bfloat16") for p in passes}
    assert measured.absent == {peer.name: "does not run on cpu" for peer in CONV.peers if "cpu" not in peer.devices}
    assert measured.memory.keys() == measured.traffic.keys() == {"float32", "bfloat16"}


def test_backward_alone_is_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Rates", FixedRates)
    measured = measure(CONV, CASE, [torch.float32], ["backward"], [], runs=1)
    assert [(r.contender, r.direction) for r in measured.results] == [("madkernels", "backward")]


def test_missing_peers_say_why() -> None:
    def nothing() -> None: ...

    assert Peer("a", nothing, needs="json:loads").missing() is None
    assert Peer("b", nothing, needs="json:sing").missing() == "the installed json has no sing"
    assert Peer("c", nothing, needs="no_such_thing.part:f").missing() == "no_such_thing is not installed"
    assert "does not import" in str(Peer("d", nothing, needs="json.no_such_part:f").missing())


def test_channels_first_keeps_values() -> None:
    x = torch.randn(2, 5, 3)
    turned = channels_first(x)
    assert torch.equal(turned, x)
    assert turned.stride() == (15, 1, 5)
    assert channels_first(x[0]) is not None
    assert torch.equal(channels_first(x[0]), x[0])


def test_rates_are_measured() -> None:
    rates = machine.Rates(["float32", "bfloat16"])
    rates.measure()
    assert len(rates.exp2) == len(rates.copy) == 1
    assert {name: len(found) for name, found in rates.multiply.items()} == {"float32": 1, "bfloat16": 1}
    assert 1e7 < rates.exp2[0] < 1e14
    assert 1e7 < rates.copy[0] < 1e14


def test_rates_of_multiplying() -> None:
    """The best of several, since others share the machine. Pairs of bfloat16 multiply at twice the rate of float32 on some
    CPUs, and at half of it on others."""
    rates = {
        name: max(_C.multiply_rate(name, 1) for _ in range(5)) for name in ("float64", "float32", "bfloat16", "float16")
    }
    assert all(1e8 < rate < 1e13 for rate in rates.values())
    assert rates["float32"] > 1.4 * rates["float64"]
    assert rates["bfloat16"] > 0.3 * rates["float32"]
    assert rates["float16"] > 0.6 * rates["float32"]
    with pytest.raises(ValueError, match="dtype is int8; expected float32, bfloat16, float16 or float64"):
        _C.multiply_rate("int8", 1)


def test_machine_is_described() -> None:
    facts = machine.describe()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    assert facts["cpu"]
    assert machine.last_level_cache() >= 1 << 18


def test_case_names_are_unique_and_inputs_repeat() -> None:
    for cases in (benchmark_of(op).cases for op in OPS):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            if not case.quick:
                continue
            first, second = case.make_inputs(torch.float32), case.make_inputs(torch.float32)
            assert all(torch.equal(first[name], second[name]) for name in first)
            shapes = {n: tuple(getattr(case, axis) for axis in axes) for n, axes in case.axes.items() if n != "out"}
            assert {name: tuple(value.shape) for name, value in first.items()} == shapes


def test_cases_refuse_what_is_no_size() -> None:
    with pytest.raises(ValueError, match="case 'x': dim is 0; expected an integer of at least 1"):
        ConvCase(name="x", batch=1, seqlen=1, dim=0, width=2)
    with pytest.raises(ValueError, match="case 'x': groups is 3; expected a divisor of dim, 8"):
        ScanCase(name="x", batch=1, seqlen=1, dim=8, dstate=1, groups=3)
    with pytest.raises(ValueError, match="case 'x': z is 1; expected true or false"):
        ScanCase(name="x", batch=1, seqlen=1, dim=8, dstate=1, z=1)  # type: ignore[arg-type]
