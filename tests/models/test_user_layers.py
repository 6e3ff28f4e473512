"""Layers from outside, by one line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from madkernels.models import HybridLM, SpecError, add_layer, layers, parse
from madkernels.models.causality import check_causal
from madkernels.models.layers import LAYERS, Layer, user_layers


class Averages(nn.Module):
    """The mean of what came before, mixed."""

    def __init__(self, dim: int, scale: float = 1.0, hidden: int = 8) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(dim, hidden), nn.Linear(hidden, dim), scale

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return self.scale * self.up(self.down(x.cumsum(1) / count))


@pytest.fixture(autouse=True)
def only_here() -> Iterator[None]:
    before = dict(LAYERS)
    yield
    LAYERS.clear()
    LAYERS.update(before)
    layers._user.clear()


def test_joins_with_one_line() -> None:
    add_layer("averages", Averages)
    model = HybridLM("averages:hidden=4,scale=0.5 mlp", vocab_size=8, dim=16).double()
    layer = model.backbone.layers[0]
    assert isinstance(layer, Layer)
    assert (layer.module.scale, layer.module.down.out_features) == (0.5, 4)
    tokens = torch.randint(8, (2, 9))
    states = model.init_state(2)
    steps = torch.stack([model.step(tokens[:, t], states) for t in range(9)], 1)
    torch.testing.assert_close(steps, model(tokens))
    packed = model(tokens[:1], cu_seqlens=torch.tensor([0, 4, 4, 9], dtype=torch.int32))
    torch.testing.assert_close(packed, torch.cat([model(tokens[:1, :4]), model(tokens[:1, 4:])], 1))
    assert layer.flops(10) == 2 * 10 * 2 * 16 * 4
    assert layer.state_size(10) == 0
    check_causal(lambda: LAYERS["averages"](16), "averages", dim=16)
    assert str(parse("averages:hidden=8")) == "averages"
    assert list(user_layers()) == ["averages"]


def test_a_layer_class_joins_as_it_is() -> None:
    add_layer("mine", LAYERS["mlp"])
    assert LAYERS["mine"] is LAYERS["mlp"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="there is a layer mamba already"):
        add_layer("mamba", Averages)
    with pytest.raises(ValueError, match="'My Layer' is no name for a layer"):
        add_layer("My Layer", Averages)
    with pytest.raises(ValueError, match="Linear: parameter out_features needs a default that is a number"):
        add_layer("linear", nn.Linear)
    with pytest.raises(SpecError, match="unknown layer 'averages'"):
        parse("averages")
