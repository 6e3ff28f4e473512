"""Architectures brought to one state, or one number of parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from madkernels.models import HybridLM, add_layer, counting, layers, parse
from madkernels.models.layers import LAYERS, StateOption
from madkernels.models.normalise import fixed_state, parameters, with_parameters, with_state


class Memory(nn.Module):
    """From outside: keeps as many vectors as it has slots."""

    state_option = StateOption("slots")
    hidden_option = "wide"

    def __init__(self, dim: int, slots: int = 4, wide: int = 32) -> None:
        super().__init__()
        self.up, self.down, self.slots = nn.Linear(dim, wide), nn.Linear(wide, dim), slots

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x))
        return y

    def state_size(self, seqlen: int) -> int:
        return self.up.in_features * min(seqlen, self.slots)


@pytest.fixture(autouse=True)
def only_here() -> Iterator[None]:
    before = dict(LAYERS)
    yield
    LAYERS.clear()
    LAYERS.update(before)
    layers._user.clear()


@pytest.mark.parametrize("name", sorted(name for name, layer in LAYERS.items() if layer.state_option))
@pytest.mark.parametrize("total", [4096, 8192])
def test_every_layer_with_a_fixed_state(name: str, total: int) -> None:
    start = {"linear-attention": ":normalise=false", "hyena-mr": ":taps=5"}.get(name, "")
    found = with_state(f"2*({name}{start} swiglu)", total, 128)
    assert counting.state_size(HybridLM(found, vocab_size=8, dim=128), 100) == total == fixed_state(found, 128)


def test_the_papers_sizes_come_out() -> None:
    assert with_state("4*mamba", 4096, 128) == parse("4*mamba:dstate=4")
    assert with_state("2*(hyena:order=9 swiglu)", 4096, 128) == parse("2*(hyena swiglu)")
    assert with_state("2*(gated-linear-attention:heads=2 swiglu)", 4096, 128) == parse("2*(gated-linear-attention swiglu)")


def test_a_state_that_grows_is_left_alone_and_a_window_is_not() -> None:
    found = with_state("mamba attention:heads=4 hyena sliding-attention", 6144, 128)
    assert found == parse("mamba:dstate=8 attention:heads=4 hyena sliding-attention:window=7")
    assert fixed_state(found, 128) == 6144


@pytest.mark.parametrize("seqlen", [3, 6, 100])
def test_the_state_of_sliding_attention_is_its_window(seqlen: int) -> None:
    arch = "sliding-attention:heads=4,window=5"
    assert fixed_state(arch, 32) == 2 * 32 * 6  # keys and values of the token itself and of five before it
    layer = parse(arch).layers[0].build(32)
    state = layer.init_state(1)
    layer(torch.zeros(1, seqlen, 32), state=state)
    assert state["k"].numel() + state["v"].numel() == layer.state_size(seqlen) == 2 * 32 * min(seqlen, 6)
    assert fixed_state("attention:heads=4", 32) == 0


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_only_what_says_so_grows(name: str) -> None:
    layer = LAYERS[name](128)
    assert layer.state_grows == (layer.state_size(10**9) < layer.state_size(10**9 + 1)) == (name == "attention")


@pytest.mark.parametrize("make", [Memory, functools.partial(Memory, wide=32)], ids=["class", "partial"])
def test_a_layer_from_outside_has_its_share(make: Callable[..., nn.Module]) -> None:
    add_layer("memory", make)
    assert with_state("memory mamba swiglu", 4096, 128) == parse("memory:slots=16 mamba:dstate=8 swiglu")
    assert fixed_state("2*memory", 128) == 2 * 4 * 128
    found = with_parameters("memory swiglu", 100_000, 128)
    assert [dict(spec.options) for spec in found.layers] == [{"wide": 152}, {"hidden": 152}]


def test_a_layer_that_is_added_again_is_another() -> None:
    add_layer("memory", Memory)
    assert fixed_state("memory", 128) == 512
    add_layer("memory", type("Twice", (Memory,), {"state_size": lambda self, seqlen: 1024}))
    assert fixed_state("memory", 128) == 1024


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        ({"mixes": "tokens"}, "memory: mixes is 'tokens'; it takes sequence, channel, both"),
        ({"state_grows": 1}, "memory: state_grows is 1; it takes True or False"),
        ({"is_attention": None}, "memory: is_attention is None; it takes True or False"),
        ({"state_option": "slots"}, "memory: state_option is 'slots'; it takes a StateOption"),
        ({"state_option": StateOption("slot")}, "memory: 'slot' is no option that is a whole number; those are slots, wide"),
        ({"hidden_option": "width"}, "memory: 'width' is no option that is a whole number; those are slots, wide"),
    ],
)
def test_what_no_layer_is(says: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        add_layer("memory", type("Wrong", (Memory,), says))


def test_a_state_that_grows_unsaid_is_refused() -> None:
    add_layer("memory", type("Growing", (Memory,), {"state_size": lambda self, seqlen: seqlen}))
    with pytest.raises(ValueError, match="the state of Growing grows with the sequence: its class needs state_grows = True"):
        fixed_state("memory", 128)
    said = {"state_size": lambda self, seqlen: seqlen, "state_grows": True}
    add_layer("memory", type("Growing", (Memory,), said))
    assert fixed_state("memory", 128) == 0
    with pytest.raises(ValueError, match="no layer has a fixed state that could be set"):
        with_state("memory", 4096, 128)


def test_unreachable_states_are_refused() -> None:
    with pytest.raises(
        ValueError, match="no layer has a fixed state that could be set; those that have are sliding-attention"
    ):
        with_state("attention swiglu", 4096, 128)
    with pytest.raises(ValueError, match="a state of 4095 does not divide among 2 layers"):
        with_state("2*mamba", 4095, 128)
    with pytest.raises(
        ValueError, match="no dstate gives a state of 1000 at width 128; nearest: 768 with mamba:dstate=3, 1024"
    ):
        with_state("mamba", 1000, 128)
    with pytest.raises(ValueError, match="hyena-se:taps=1: with taps=1 it has no state that could be brought to 4096"):
        with_state("hyena-se:taps=1", 4096, 128)


@pytest.mark.parametrize("arch", ["2*(attention swiglu)", "hyena moe attention moe", "mamba swiglu"])
def test_parameters(arch: str) -> None:
    found = with_parameters(arch, 500_000, 128)
    assert parameters(found, 128) == pytest.approx(500_000, rel=0.06)
    step = [s.name for s in found.layers].count("moe") * 8 * 3 * 128 * 8 or 3 * 128 * 8 * 2
    assert abs(parameters(found, 128) - 500_000) <= step / 2


def test_parameters_that_cannot_be_reached() -> None:
    have = ", ".join(name for name, layer in LAYERS.items() if layer.hidden_option)
    with pytest.raises(ValueError, match=f"no layer has a hidden width that could be set; those that have are {have}"):
        with_parameters("attention", 500_000, 128)
    with pytest.raises(ValueError, match="more than 1,000"):
        with_parameters("attention swiglu", 1000, 128)
