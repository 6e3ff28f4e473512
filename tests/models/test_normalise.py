"""Architectures brought to one state, or one number of parameters."""

from __future__ import annotations

import pytest

from madkernels.models import HybridLM, counting, parse
from madkernels.models.normalise import FREE, fixed_state, parameters, with_parameters, with_state


@pytest.mark.parametrize("name", sorted(FREE))
@pytest.mark.parametrize("total", [4096, 8192])
def test_every_layer_with_a_fixed_state(name: str, total: int) -> None:
    start = {"linear-attention": ":normalise=false", "hyena-mr": ":taps=5"}.get(name, "")
    found = with_state(f"2*({name}{start} swiglu)", total, 128)
    assert counting.state_size(HybridLM(found, vocab_size=8, dim=128), 100) == total == fixed_state(found, 128)


def test_the_papers_sizes_come_out() -> None:
    assert with_state("4*mamba", 4096, 128) == parse("4*mamba:dstate=4")
    assert with_state("2*(hyena:order=9 swiglu)", 4096, 128) == parse("2*(hyena swiglu)")
    assert with_state("2*(gated-linear-attention:heads=2 swiglu)", 4096, 128) == parse("2*(gated-linear-attention swiglu)")


def test_attention_is_left_alone() -> None:
    found = with_state("mamba attention:heads=4 hyena sliding-attention", 4096, 128)
    assert found == parse("mamba:dstate=8 attention:heads=4 hyena sliding-attention")
    assert fixed_state(found, 128) == 4096


def test_unreachable_states_are_refused() -> None:
    with pytest.raises(
        ValueError, match="no layer has a fixed state that could be set; those that have are linear-attention"
    ):
        with_state("attention swiglu", 4096, 128)
    with pytest.raises(ValueError, match="a state of 4095 does not divide among 2 layers"):
        with_state("2*mamba", 4095, 128)
    with pytest.raises(
        ValueError, match="no dstate gives a state of 1000 at width 128; nearest: 768 with mamba:dstate=3, 1024"
    ):
        with_state("mamba", 1000, 128)


@pytest.mark.parametrize("arch", ["2*(attention swiglu)", "hyena moe attention moe", "mamba swiglu"])
def test_parameters(arch: str) -> None:
    found = with_parameters(arch, 500_000, 128)
    assert parameters(found, 128) == pytest.approx(500_000, rel=0.06)
    step = [s.name for s in found.layers].count("moe") * 8 * 3 * 128 * 8 or 3 * 128 * 8 * 2
    assert abs(parameters(found, 128) - 500_000) <= step / 2


def test_parameters_that_cannot_be_reached() -> None:
    with pytest.raises(ValueError, match="no swiglu or moe layer"):
        with_parameters("attention", 500_000, 128)
    with pytest.raises(ValueError, match="more than 1,000"):
        with_parameters("attention swiglu", 1000, 128)
