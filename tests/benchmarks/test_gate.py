"""A contender is timed only if it is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from madkernels import OPS, causal_conv, reference, selective_scan
from madkernels.benchmarks import gate as gate_module
from madkernels.benchmarks.cases import Case, Inputs
from madkernels.benchmarks.causal_conv import ConvCase
from madkernels.benchmarks.gate import TOLERANCES, Gate
from madkernels.benchmarks.harness import Benchmark, Peer, benchmark_of, channels_first
from madkernels.benchmarks.selective_scan import BENCHMARK as SCAN
from madkernels.benchmarks.selective_scan import ScanCase

BENCHMARKS = [benchmark_of(op) for op in OPS]
QUICK = [(benchmark, case) for benchmark in BENCHMARKS for case in benchmark.cases if case.quick]
SCAN_CASE = ScanCase(name="some", batch=2, seqlen=20, dim=40, dstate=4, D=True, z=True, delta_bias=True, delta_softplus=True)
CONV_CASE = ConvCase(name="some", batch=2, seqlen=20, dim=40, width=4, bias=True)


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    inputs = case.make_inputs(dtype)
    shape = [getattr(case, axis) for axis in case.axes["out"]]
    return inputs | {"out": torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)}


def gate_of(case: Case, dtype: torch.dtype = torch.float32) -> Gate:
    [op] = [benchmark.name for benchmark in BENCHMARKS if type(case) is type(benchmark.cases[0])]
    return Gate(case, partial(getattr(reference, op), **case.options), inputs_of(case, dtype))


def quick_pairs() -> list[Any]:
    wanted = [(c, p) for b, c in QUICK for p in b.peers if p.auto and not p.missing() and p.accepts(c)]
    return [pytest.param(case, peer, id=f"{type(case).__name__}-{case.name}-{peer.name}") for case, peer in wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("case", "peer"), quick_pairs())
def test_peers_are_right(case: Case, peer: Peer, dtype: torch.dtype) -> None:
    arrange = channels_first if peer.channel_first else torch.clone
    # Backward where it is not worth timing as well: those that write in place aside, it has to be right too.
    errors = gate_of(case, dtype).errors(partial(peer.function, **case.options), peer.backward, arrange)
    assert max(errors) <= TOLERANCES[dtype]


@pytest.mark.parametrize(("benchmark", "case"), QUICK, ids=lambda value: value.name)
def test_ops_are_right(benchmark: Benchmark, case: Case) -> None:
    errors = gate_of(case).errors(partial(benchmark.function, **case.options), True, torch.clone)
    assert max(errors) <= TOLERANCES[torch.float32]


def test_peers_split_time_where_it_does_not_divide() -> None:
    case = ScanCase(name="some", batch=2, seqlen=19, dim=6, dstate=3, delta_softplus=True)
    for peer in SCAN.peers:
        if peer.auto and not peer.missing():
            errors = gate_of(case).errors(partial(peer.function, **case.options), peer.backward, torch.clone)
            assert max(errors) <= 1e-5, peer.name


def wrong_last_channel(**inputs: Any) -> Tensor:
    out = selective_scan(**inputs).clone()
    out[..., -1] *= 1.001
    return out


def wrong_first_step(**inputs: Any) -> Tensor:
    out = selective_scan(**inputs).clone()
    out[:, 0] = 0
    return out


def wrong_nan(**inputs: Any) -> Tensor:
    out = selective_scan(**inputs).clone()
    out[-1, -1, 0] = torch.nan
    return out


def wrong_gradient_of(name: str) -> Callable[..., Tensor]:
    """The output of the op, with half the gradient of one input."""

    def scan(**inputs: Any) -> Tensor:
        half = inputs[name] / 2
        return selective_scan(**inputs | {name: half + half.detach()})

    return scan


WRONG = [wrong_last_channel, wrong_first_step, wrong_nan]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_output_is_caught(cut: bool, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:
        monkeypatch.setattr(gate_module, "WHOLE", 0)
    gate = gate_of(SCAN_CASE)
    assert gate.checked == ("16 of 40 channels, 1 of 2 sequences" if cut else "all of it")
    right = partial(selective_scan, **SCAN_CASE.options)
    assert max(gate.errors(right, True, torch.clone)) <= 1e-5
    assert gate.errors(partial(wrong, **SCAN_CASE.options), False, torch.clone)[0] > 1e-5


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_wrong_gradient_is_caught(cut: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:
        monkeypatch.setattr(gate_module, "WHOLE", 0)
    forward, backward = gate_of(SCAN_CASE).errors(partial(wrong_gradient_of(name), **SCAN_CASE.options), True, torch.clone)
    assert forward <= 1e-5
    assert backward == pytest.approx(0.5, rel=1e-3)


def test_cut_catches_a_gradient_that_leaks_between_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels without a gradient must add nothing to that of weights that only others use."""
    monkeypatch.setattr(gate_module, "WHOLE", 0)

    def leaking(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
        out = causal_conv(x, weight, bias, activation=activation)
        assert isinstance(out, Tensor)
        return out + (weight.sum() - weight.sum().detach())

    right = gate_of(CONV_CASE).errors(partial(causal_conv, **CONV_CASE.options), True, torch.clone)
    wrong = gate_of(CONV_CASE).errors(partial(leaking, **CONV_CASE.options), True, torch.clone)
    assert max(right) <= 1e-5
    assert wrong[0] <= 1e-5
    assert wrong[1] > 1e-2
