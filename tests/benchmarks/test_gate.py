"""A contender is timed only if it is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from madkernels import OPS, attention, causal_conv, selective_scan
from madkernels.benchmarks import gate as gate_module
from madkernels.benchmarks.attention import BENCHMARK as ATTENTION, AttentionCase
from madkernels.benchmarks.cases import Case, Inputs
from madkernels.benchmarks.causal_conv import ConvCase
from madkernels.benchmarks.gate import TOLERANCES, Gate, picked
from madkernels.benchmarks.harness import Benchmark, Peer, benchmark_of, channels_first
from madkernels.benchmarks.selective_scan import BENCHMARK as SCAN, ScanCase

BENCHMARKS = [benchmark_of(op) for op in OPS]
QUICK = [(benchmark, case) for benchmark in BENCHMARKS for case in benchmark.cases if case.quick]
SCAN_CASE = ScanCase(name="some", batch=2, seqlen=20, dim=40, dstate=4, D=True, z=True, delta_bias=True, delta_softplus=True)
CONV_CASE = ConvCase(name="some", batch=2, seqlen=20, dim=40, width=4, bias=True)


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    inputs = case.make_inputs(dtype)
    shape = [getattr(case, axis) for axis in case.axes["out"]]
    return inputs | {"out": torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)}


def gate_of(case: Case, dtype: torch.dtype = torch.float32) -> Gate:
    [reference] = [benchmark.reference for benchmark in BENCHMARKS if type(case) is type(benchmark.cases[0])]
    return Gate(case, partial(reference, **case.options), inputs_of(case, dtype))


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


def test_cut_takes_whole_groups_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ScanCase(name="some", batch=2, seqlen=20, dim=40, dstate=4, groups=5)
    monkeypatch.setattr(gate_module, "WHOLE", 0)
    gate = gate_of(case)
    assert gate.checked == "2 of 5 groups, 16 of 40 channels, 1 of 2 sequences"
    assert gate.index["groups"].tolist() == [4, 0]
    assert gate.index["dim"].tolist() == [*range(32, 40), *range(8)]
    assert max(gate.errors(partial(selective_scan, **case.options), True, torch.clone)) <= 1e-5
    for name in ("B", "C", "A"):
        errors = gate.errors(partial(wrong_gradient_of(name), **case.options), True, torch.clone)
        assert errors[1] == pytest.approx(0.5, rel=1e-3)


def attention_with(change: Callable[[Tensor], Tensor], **inputs: Any) -> Tensor:
    out = attention(**inputs).clone()
    change(out)
    return out


def wrong_key_head(q: Tensor, k: Tensor, **inputs: Any) -> Tensor:
    """Query heads take key heads in turn, rather than blocks of them one key head."""
    return attention(q, k[:, :, [1, 0]], **inputs)


def sees_too_much(**inputs: Any) -> Tensor:
    return attention(**inputs | {"causal": False})


def half_the_gradient_of_keys(k: Tensor, **inputs: Any) -> Tensor:
    return attention(k=k / 2 + (k / 2).detach(), **inputs)


HEADS_CASE = AttentionCase(
    name="some", batch=2, seqlen=21, heads=8, kv_heads=2, head_dim=12, head_dim_v=9,
    causal=True, alibi_slopes=True, sink=True,
)  # fmt: skip


@pytest.mark.parametrize("memory", [1 << 24, 8 * 21 * 21], ids=["all heads", "one key head"])
def test_cut_compares_heads(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for the scores of one sequence or of half of it: two key heads or one, with their query heads."""
    monkeypatch.setattr(gate_module, "WHOLE", 0)
    monkeypatch.setattr(gate_module, "LARGEST", memory // 2)
    gate = gate_of(HEADS_CASE)
    heads = 2 if memory == 1 << 24 else 1
    assert gate.checked == f"{heads} of 2 key heads, {4 * heads} of 8 heads, 1 of 2 sequences"
    assert gate.index["heads"].tolist()[:4] == [4, 5, 6, 7]
    assert gate.exact["k"].shape == (1, 21, heads, 12)
    assert gate.exact["alibi_slopes"].shape == (1, 4 * heads)
    assert gate.exact["sink"].shape == (4 * heads,)

    def errors(function: Callable[..., Any]) -> list[float]:
        return gate.errors(partial(function, **HEADS_CASE.options), True, torch.clone)

    assert max(errors(attention)) <= 1e-5
    assert errors(partial(attention_with, lambda out: out[-1, :, 5].mul_(1.001)))[0] > 1e-5
    assert errors(partial(attention_with, lambda out: out[-1, 0, 7].zero_()))[0] > 1e-5
    assert errors(wrong_key_head)[0] > 1e-1
    assert errors(sees_too_much)[0] > 1e-1
    assert errors(half_the_gradient_of_keys)[1] == pytest.approx(0.5, rel=1e-3)


def test_what_is_compared_of_the_cases_of_attention() -> None:
    """As many heads as there is memory for, of whole groups; one group where there is not."""
    counts = {case.name: picked(case) for case in ATTENTION.cases}
    taken = {name: len(index["heads"]) if index else None for name, index in counts.items()}
    assert taken["512-64"] is None
    assert taken["2k-64"] == 4
    assert taken["8k-128"] == taken["window"] == 1
    assert taken["gqa"] == 4
    assert counts["gqa"]["kv_heads"].tolist() == [7]


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
