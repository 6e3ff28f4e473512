"""Linear layers by whichever way is fastest: the same numbers, derivatives and choices."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madkernels.models import HybridLM
from madkernels.models.layers import linear as chosen
from madkernels.models.layers.linear import Linear, Ways, linear

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
WAYS = [Ways(*ways) for ways in itertools.product(chosen.FORWARD, chosen.INPUT_GRADIENT, chosen.WEIGHT_GRADIENT)]


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(chosen.VARIABLE, raising=False)
    monkeypatch.setattr(chosen, "LEAST", 1)
    chosen._ways_of.cache_clear()


def drawn(rows: tuple[int, ...] = (3, 5), inputs: int = 20, outputs: int = 7) -> list[Tensor]:
    shapes = (*rows, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("ways", WAYS, ids="-".join)
def test_every_way_gives_the_same(ways: Ways, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(table: Any, name: str) -> Any:
        way = table[name]
        return lambda *arguments: taken.append(name) or way(*arguments)

    taken: list[str] = []
    monkeypatch.setattr(chosen, "ways_of", lambda *shape: ways)
    for table, name in zip((chosen.FORWARD, chosen.INPUT_GRADIENT, chosen.WEIGHT_GRADIENT), ways, strict=True):
        monkeypatch.setitem(table, name, told(table, name))
    leaves = drawn()[: 3 if biased else 2]
    found, wanted = linear(*leaves), F.linear(*leaves)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(y.square().sum(), leaves, create_graph=False) for y in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert taken == ([] if ways == Ways() else list(ways))


@pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")
def test_losses_of_a_training_agree_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(ways: Ways) -> list[float]:
        monkeypatch.setattr(chosen, "ways_of", lambda *shape: ways)
        torch.manual_seed(0)
        model = HybridLM("attention:heads=2 swiglu mamba hyena", vocab_size=11, dim=16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        tokens, found = torch.randint(11, (4, 20)), []
        for _ in range(30):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    plain, other = losses(Ways()), losses(Ways("onednn", "onednn", "turned"))
    assert other != plain
    assert other == pytest.approx(plain, rel=1e-3)
    assert plain[-1] < plain[0] / 2


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "ways_of", lambda *shape: Ways(dx="onednn", dweight="turned"))

    def curvature(y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)  # type: ignore[arg-type]

    leaves = drawn()
    found, wanted = curvature(linear(*leaves), leaves), curvature(F.linear(*leaves), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_a_choice_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(chosen, "measure", lambda *shape: asked.append(shape) or Ways("onednn", "torch", "turned"))
    for rows in (1000, 1023, 512):
        assert chosen.ways_of(rows, 7, 20) == Ways("onednn", "torch", "turned")
    assert asked == [(512, 7, 20)]
    [machine] = json.loads((tmp_path / "madkernels/linear.json").read_text()).values()
    assert machine == {"512 x 20 x 7": ["onednn", "torch", "turned"]}
    chosen._ways_of.cache_clear()  # as another process
    assert chosen.ways_of(600, 7, 20) == Ways("onednn", "torch", "turned")
    assert len(asked) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 3}'])
def test_a_damaged_file_is_written_anew(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "measure", lambda *shape: Ways())
    (tmp_path / "madkernels").mkdir()
    (tmp_path / "madkernels/linear.json").write_text(text)
    assert chosen.ways_of(600, 7, 20) == Ways()
    assert "512 x 20 x 7" in (tmp_path / "madkernels/linear.json").read_text()


def test_a_way_that_is_wrong_or_absent_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(dy: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    found = {"torch": lambda: torch.ones(400, 400) @ torch.ones(400, 400), "wrong": lambda: torch.ones(400, 400)}
    assert chosen._fastest(found | {"absent": lambda: absent(torch.ones(1), torch.ones(1))}) == "torch"
    quick = found["torch"]()
    assert chosen._fastest(found | {"quick": lambda: quick}) == "quick"


def test_torch_is_taken_where_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, small products, autocast, transforms, and where the environment says so."""
    monkeypatch.setattr(chosen, "ways_of", lambda *shape: pytest.fail("it was asked"))
    x, weight, bias = (t.detach() for t in drawn())
    linear(x.double(), weight.double(), bias.double())
    torch.func.vmap(linear, (0, None, None))(x, weight, bias)
    torch.func.jvp(lambda t: linear(t, weight, bias), (x,), (x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    monkeypatch.setattr(chosen, "LEAST", 2**24)
    linear(x, weight, bias)
    monkeypatch.setattr(chosen, "LEAST", 1)
    monkeypatch.setenv(chosen.VARIABLE, "torch")
    linear(x, weight, bias)


def test_a_layer_in_one_graph() -> None:
    layer = Linear(20, 7)
    x = torch.randn(3, 5, 20)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), nn.functional.linear(x, layer.weight, layer.bias))
