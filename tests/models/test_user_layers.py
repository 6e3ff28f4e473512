"""Layers from outside, by one line."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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
    states, apart = model.init_state(3), [model.init_state(1) for _ in range(3)]
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    model(tokens[:1], cu_seqlens=offsets, states=states)
    for part, own in zip(tokens[:1].split([4, 0, 5], 1), apart, strict=True):
        model(part, states=own)
    for t in range(3):
        alone = torch.cat([model.step(tokens[1:, t], own) for own in apart])
        torch.testing.assert_close(model.step(tokens[1:, t].expand(3), states), alone)
    assert layer.flops(10) == 2 * 10 * 2 * 16 * 4
    assert layer.state_size(10) == 0
    check_causal(lambda: LAYERS["averages"](16), "averages", dim=16)
    assert str(parse("averages:hidden=8")) == "averages"
    assert list(user_layers()) == ["averages"]


def averages_of_two(dim: int, scale: float = 1.0) -> nn.Module:
    return nn.Sequential(Averages(dim, scale), nn.Linear(dim, dim))


def through_pickle(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("again", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize(
    "make", [Averages, averages_of_two, functools.partial(averages_of_two, scale=3.0)], ids=["class", "function", "partial"]
)
def test_is_copied_and_saved(make: Callable[..., nn.Module], again: Callable[[nn.Module], nn.Module]) -> None:
    add_layer("averages", make)
    model = HybridLM("2*averages:scale=0.5 mlp", vocab_size=8, dim=16)
    tokens = torch.randint(8, (2, 9))
    other = again(model)
    assert type(other.backbone.layers[0]) is LAYERS["averages"]
    assert torch.equal(other(tokens), model(tokens))
    layer, x = model.backbone.layers[0], torch.randn(1, 3, 16)
    assert torch.equal(again(layer)(x), layer(x))


IN_MAIN = """
import sys, torch
from torch import nn
from madkernels.models import HybridLM, add_layer

class Mine(nn.Module):
    def __init__(self, dim: int, hidden: int = 8) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(dim, hidden), nn.Linear(hidden, dim))

    def forward(self, x):
        return self.linear(x)

if sys.argv[1] == "load":
    try:
        torch.load("model.pt", weights_only=False)
    except ValueError as error:
        print(error)

add_layer("mine", Mine)
tokens = torch.arange(8)[None]
if sys.argv[1] == "save":
    model = HybridLM("mine:hidden=4 mlp", vocab_size=8, dim=16)
    torch.save((model, model(tokens)), "model.pt")
else:
    model, logits = torch.load("model.pt", weights_only=False)
    print(torch.equal(model(tokens), logits))
"""


def test_is_loaded_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(IN_MAIN)

    def run(what: str) -> list[str]:
        done = subprocess.run([sys.executable, "script.py", what], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert run("save") == []
    assert run("load") == [
        "this holds a layer mine, which is not known here: call add_layer('mine', ...) before loading",
        "True",
    ]


@pytest.mark.parametrize("documents", [1, 2])
def test_a_packed_row_of_no_tokens(documents: int) -> None:
    add_layer("averages", Averages)
    layer, x = LAYERS["averages"](16), torch.zeros(1, 0, 16)
    y = layer(x, cu_seqlens=torch.zeros(documents + 1, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == x.shape
    assert not any(p.grad.any() for p in layer.parameters())


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
