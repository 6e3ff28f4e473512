"""The modal filter of Hyena: against its sum written out in complex numbers, long, and step by step."""

from __future__ import annotations

import pytest
import torch
from checks import relative_error
from torch import Tensor

from madkernels.models.init import parameter_groups
from madkernels.models.layers import LAYERS, Layer
from madkernels.models.layers.filters import ModalFilter

LONG = 8192


def modal(channels: int = 6, order: int = 3, horizon: int = 100) -> ModalFilter:
    torch.manual_seed(3)
    return ModalFilter(channels, order, horizon)


def slow(channels: int = 6, order: int = 3) -> ModalFilter:
    """As trained on long sequences: poles just within the unit circle, at all angles."""
    made = modal(channels, order, LONG)
    with torch.no_grad():
        made.log_poles[..., 0] = -torch.rand(channels, order) / 2000
    return made


def written_out(made: ModalFilter, length: int) -> Tensor:
    """Pole by pole and tap by tap: R, R p, R p^2, ..."""
    poles = torch.view_as_complex(made.log_poles.detach().double()).exp()
    amounts, taps = torch.view_as_complex(made.residues.detach().double()), []
    for _ in range(length):
        taps.append(amounts.real.sum(1))
        amounts = amounts * poles
    return torch.stack(taps, 1)


def hyena(**options: int) -> Layer:
    torch.manual_seed(3)
    layer = LAYERS["hyena"](16, expand=1, groups=1, order=3, horizon=100, modal=True, **options)
    with torch.no_grad():
        layer.filter.log_poles[..., 0] = -torch.rand(16, 3) / 200
    return layer


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 300])
def test_is_the_sum_of_its_modes(length: int) -> None:
    made = modal().double()
    found = made(length, torch.float64)
    assert found.shape == (6, length)
    assert relative_error(found, written_out(made, length) if length else found) < 1e-13


def test_long_in_float32() -> None:
    """The last taps are as exact as the first, and far above nothing."""
    made = slow()
    found, wanted = made(LONG), written_out(made, LONG)
    assert found.dtype == torch.float32
    assert wanted[:, -64:].norm() > 0.01 * wanted[:, :64].norm()
    assert relative_error(found[:, -64:], wanted[:, -64:]) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(LONG), found)


def test_starts_with_a_norm_of_about_one() -> None:
    norms = ModalFilter(512, 8, 128)(2000).norm(dim=1)
    assert 0.9 < norms.square().mean().sqrt() < 1.1


def test_rounded_parameters_still_decay_as_slowly() -> None:
    """In bfloat16 a pole near 1 would be 1: the logarithm keeps its digits."""
    made = slow()
    rates = made.log_poles.detach()[..., 0]
    assert relative_error(made.to(torch.bfloat16).log_poles.detach()[..., 0].float(), rates) < 0.01


def test_poles_are_not_decayed() -> None:
    layer = hyena()
    _, kept = parameter_groups(layer, 0.1)
    assert any(p is layer.filter.log_poles for p in kept["params"])


@torch.no_grad()
def test_the_layer_is_that_of_explicit_taps() -> None:
    """With the same filter, written out as taps."""
    layer, x = hyena().double(), torch.randn(2, 150, 16, dtype=torch.float64)
    explicit = LAYERS["hyena"](16, expand=1, groups=1, taps=150).double()
    weights = {k: v for k, v in layer.state_dict().items() if not k.startswith("filter")}
    explicit.load_state_dict(weights | {"filter.weight": written_out(layer.filter, 150)})
    assert relative_error(layer(x), explicit(x)) < 1e-12


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 2e-5), (True, 0.02)])
@torch.no_grad()
def test_steps_against_the_whole_at_length(autocast: bool, tolerance: float) -> None:
    """After 8192 tokens in three parts, 20 steps from a state that has not grown."""
    layer, x = hyena(), torch.randn(1, LONG + 20, 16)
    exact = hyena().double()(x.double())[:, -20:]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        state = layer.init_state(1)
        sizes = {key: t.shape for key, t in state.items()}
        for part in x[:, :LONG].split([5000, 3000, 192], 1):
            layer(part, state=state)
        steps = torch.stack([layer.step(x[:, t], state) for t in range(LONG, LONG + 20)], 1)
        whole = layer(x)[:, -20:]
    assert {key: t.shape for key, t in state.items()} == sizes
    assert relative_error(steps.double(), exact) < tolerance
    assert relative_error(whole.double(), exact) < tolerance


def test_is_modal_or_has_taps() -> None:
    with pytest.raises(ValueError, match="a filter is modal or has taps, not both"):
        LAYERS["hyena"](16, modal=True, taps=3)
