"""Text after prompts of any lengths, and models on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from madkernels.models import HybridLM
from madkernels.models.generation import choose, continue_prompts, prefill
from madkernels.models.layers import LAYERS
from madkernels.models.layers.user import adapt

LENGTHS = (5, 1, 9, 5)


def model(arch: str, **options: Any) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(arch, **{"vocab_size": 16, "dim": 32} | options)


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(16, (n,), generator=generator) for n in lengths]


# ---- batches of unequal prompts


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_is_continued_as_each_prompt_alone(name: str) -> None:
    """Far enough that short prompts outgrow a window."""
    lm, given = model(f"{name} swiglu").double(), prompts(*LENGTHS)
    found = continue_prompts(lm, given, 12)
    for prompt, new in zip(given, found, strict=True):
        alone = lm.generate(prompt.unsqueeze(0), 12)[0]
        assert torch.equal(alone, torch.cat([prompt, torch.tensor(new)]))


HYBRIDS = (
    "2*(mamba swiglu attention:heads=4 swiglu)",
    "sliding-attention:heads=4,window=7 gated-deltanet moe hyena attention:heads=2",
    "mamba2:head_dim=16 rwkv6-time-mixer rwkv-channel-mixer hyena-experts:sparse=true hyena-mr",
)


@torch.no_grad()
@pytest.mark.parametrize("arch", HYBRIDS)
def test_prompts_are_one_batch_and_greedy_as_alone(arch: str) -> None:
    """With weights as large as training makes them, so that tokens differ."""
    lm, given = model(arch).double(), prompts(7, 130, 1, 65, 64, 2)
    for parameter in lm.parameters():
        parameter.add_(0.5 * parameter.std(correction=0).clamp_min(0.2) * torch.randn_like(parameter))
    logits, states = prefill(lm, given)
    assert all(len(value) == len(given) for state in states for value in state.values())
    for prompt, row in zip(given, logits, strict=True):
        torch.testing.assert_close(row, lm(prompt[None])[0, -1], rtol=1e-9, atol=1e-9)
    found = continue_prompts(lm, given, 12)
    assert len({token for new in found for token in new}) > 8
    for prompt, new in zip(given, found, strict=True):
        assert lm.generate(prompt[None], 12)[0, len(prompt) :].tolist() == new


class FromOutside(LAYERS["mamba"]):  # type: ignore[misc]
    """As written by somebody who does not know of states of packed documents."""

    packs_states = False


@torch.no_grad()
@pytest.mark.parametrize("make", [FromOutside, lambda dim: nn.Linear(dim, dim)], ids=["layer", "module"])
def test_layers_from_outside(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "mine", adapt("mine", make))
    lm, given = model("mine attention:heads=4 swiglu").double(), prompts(*LENGTHS)
    for options in ({}, {"temperature": 1.0, "generator": torch.Generator().manual_seed(0)}):
        for prompt, new in zip(given, continue_prompts(lm, given, 12, **options), strict=True):
            assert len(new) == 12
            assert options or lm.generate(prompt[None], 12)[0, len(prompt) :].tolist() == new


def test_a_batch_may_have_no_rows() -> None:
    assert model("mamba swiglu").generate(torch.zeros(0, 3, dtype=torch.int64), 4).shape == (0, 7)
    with pytest.raises(ValueError, match="one token at least"):
        continue_prompts(model("mamba swiglu"), [], 4)


def test_a_sequence_ends_before_its_end_token() -> None:
    lm, given = model("mamba swiglu"), prompts(*LENGTHS)
    whole = continue_prompts(lm, given, 12)
    end = whole[0][4]
    told: list[list[int]] = []
    found = continue_prompts(lm, given, 12, end=end, on_tokens=told.append)
    for new, all_of in zip(found, whole, strict=True):
        assert new == (all_of[: all_of.index(end)] if end in all_of else all_of)
    assert [[t for t in of_each if t >= 0] for of_each in zip(*told, strict=True)] == found


# ---- choosing


def drawn(shares: list[float], **options: Any) -> list[float]:
    """How often each token is drawn from these shares of probability."""
    logits = torch.tensor(shares).log().expand(4000, -1)
    plain: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}
    tokens = choose(logits, **plain | options, generator=torch.Generator().manual_seed(0))
    return (torch.bincount(tokens, minlength=len(shares)) / 4000).tolist()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 are not enough
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),  # of the three the first two have 7 / 9
    ],
    ids=str,
)
def test_what_is_drawn(options: dict[str, Any], wanted: list[float]) -> None:
    assert drawn([0.1, 0.4, 0.2, 0.3], **options) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0; expected a whole number from 1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a share above 0"),
        ({"top_p": 1.5}, "top_p is 1.5; expected a share above 0"),
        ({"temperature": float("nan")}, "temperature nan; expected both from 0"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continue_prompts(model("mlp"), prompts(3), 2, **options)


# ---- on disk


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_model_is_the_same(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    lm = model("mamba moe:balance=0.01 attention:heads=4 hyena swiglu", tied=tied).to(dtype)
    lm.save_pretrained(tmp_path / "saved", end=3)
    again = HybridLM.from_pretrained(tmp_path / "saved")
    assert str(again.arch) == str(lm.arch)
    assert again.tied == tied
    assert (again.unembedding.weight is again.embedding.weight) == tied
    for (name, ours), theirs in zip(again.state_dict().items(), lm.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    assert all(p.requires_grad for p in again.parameters())
    assert next(HybridLM.from_pretrained(tmp_path / "saved", dtype=torch.float16).parameters()).dtype == torch.float16
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["end"] == 3
    assert again.unembedding.bias is None if tied else again.unembedding.bias is not None
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1  # whoever may read one, may read all


@torch.no_grad()
def test_a_saved_model_keeps_its_options(tmp_path: Path) -> None:
    options: dict[str, Any] = {"unembedding_bias": False, "norm_eps": 0.25, "float32_residual": True}
    lm = HybridLM("mamba attention:heads=4", vocab_size=16, dim=32, **options).to(torch.bfloat16)
    lm.save_pretrained(tmp_path)
    again, text = HybridLM.from_pretrained(tmp_path), torch.arange(9)[None]
    assert torch.equal(again(text), lm(text))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in options} == options


@torch.no_grad()
def test_a_folder_of_before_there_were_options(tmp_path: Path) -> None:
    lm, text = model("mamba attention:heads=4"), torch.arange(9)[None]
    lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("unembedding_bias", "norm_eps", "float32_residual"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(HybridLM.from_pretrained(tmp_path)(text), lm(text))


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read: No such file.*expected a folder that madkernels"):
        HybridLM.from_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    for text, message in (
        ("{", "is damaged: it is no JSON object"),
        ('{"model_type": "llama"}', "is of model_type 'llama' and format None; expected 'madkernels' and 1"),
        ('{"model_type": "madkernels", "format": 1}', "does not say 'arch'"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            HybridLM.from_pretrained(tmp_path)
    model("mlp").save_pretrained(tmp_path)
    config.write_text(config.read_text().replace('"mlp"', '"mine"'))
    with pytest.raises(ValueError, match=r"(?s)config\.json: .*unknown layer 'mine'.*has to be added first: --plugin FILE"):
        HybridLM.from_pretrained(tmp_path)
    config.write_text(config.read_text().replace('"mine"', '"swiglu"'))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit config\.json"):
        HybridLM.from_pretrained(tmp_path)
    weights.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        HybridLM.from_pretrained(tmp_path)
