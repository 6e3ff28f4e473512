"""A small checkpoint under StripedHyena's names, against its formulas written out in float64 from those tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import relative_error
from safetensors.torch import save_file
from torch import Tensor

from madkernels.models import from_hf, to_hf
from madkernels.models.generation import continue_prompts

DIM, HEADS, KV_HEADS, ORDER, VOCAB = 24, 4, 2, 3, 31
CONFIG: dict[str, Any] = {
    "model_type": "stripedhyena", "vocab_size": VOCAB, "hidden_size": DIM, "num_filters": DIM, "num_layers": 4,
    "attn_layer_idxs": [1, 3], "hyena_layer_idxs": [0, 2], "num_attention_heads": HEADS, "proj_groups": HEADS // KV_HEADS,
    "state_size": ORDER, "short_filter_length": 3, "short_filter_bias": True, "inner_mlp_size": 40, "eps": 1e-3,
    "rotary_emb_base": 500, "qkv_proj_bias": False, "mha_out_proj_bias": False, "hyena_filter_groups": 1,
    "column_split_hyena": True, "tie_embeddings": False, "final_norm": True, "use_flash_rmsnorm": True,
}  # fmt: skip


def tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random, as if trained: poles just within the unit circle, at all angles."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    found = {"embedding_layer.weight": draw(VOCAB, DIM, scale=1), "unembed.weight": draw(VOCAB, DIM)}
    found["norm.scale"] = 1 + draw(DIM)
    for i in range(config["num_layers"]):
        block = {"pre_norm.scale": 1 + draw(DIM), "post_norm.scale": 1 + draw(DIM)}
        block |= {"mlp.l1.weight": draw(40, DIM), "mlp.l2.weight": draw(40, DIM), "mlp.l3.weight": draw(DIM, 40)}
        if i in config["attn_layer_idxs"]:
            block["inner_mha_cls.Wqkv.weight"] = draw(DIM + 2 * KV_HEADS * DIM // HEADS, DIM)
            block["inner_mha_cls.out_proj.weight"] = draw(DIM, DIM)
            block["inner_mha_cls.rotary_emb.inv_freq"] = draw(DIM // HEADS // 2)
        else:
            sizes = 1 - 0.02 * torch.rand(DIM, ORDER, 1, generator=generator)
            poles = torch.polar(sizes, 2 * math.pi * torch.rand(DIM, ORDER, 1, generator=generator))
            block |= {"filter.poles": torch.view_as_real(poles), "filter.residues": draw(DIM, ORDER, 1, 2, scale=0.1)}
            block |= {"filter.D": draw(DIM), "filter.short_filter_bias": draw(3 * DIM)}
            block |= {"filter.short_filter_weight": draw(3 * DIM, 1, 3), "projections.weight": draw(3 * DIM, DIM)}
            block |= {"projections.bias": draw(3 * DIM), "out_filter_dense.bias": draw(DIM)}
            block["out_filter_dense.weight"] = draw(DIM, DIM)
        found |= {f"blocks.{i}.{name}": t for name, t in block.items()}
    return {f"backbone.{name}": t.contiguous() for name, t in found.items()}


def written(folder: Path, **values: Any) -> dict[str, Tensor]:
    weights = tensors(CONFIG)
    (folder / "config.json").write_text(json.dumps(CONFIG | values))
    save_file(weights, folder / "model.safetensors")
    return weights


def norm(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG["eps"]).sqrt() * scale


def turned(x: Tensor, factor: float) -> Tensor:
    """(seqlen, heads, head_dim) as complex pairs (i, i + head_dim / 2), turned by position."""
    half = x.shape[-1] // 2
    frequencies = CONFIG["rotary_emb_base"] ** (-torch.arange(half).double() / half) / factor
    angles = torch.arange(len(x)).double()[:, None, None] * frequencies
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def attention(x: Tensor, block: dict[str, Tensor], factor: float) -> Tensor:
    size = DIM // HEADS
    projected = (x @ block["inner_mha_cls.Wqkv.weight"].T).view(len(x), -1, size)
    q, k, v = projected.split([HEADS, KV_HEADS, KV_HEADS], 1)
    q, k = turned(q, factor), turned(k, factor)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ block["inner_mha_cls.out_proj.weight"].T


def hyena(x: Tensor, block: dict[str, Tensor]) -> Tensor:
    """Mode by mode, token by token; q, k and v of each head lie together."""
    z = x @ block["projections.weight"].T + block["projections.bias"]
    taps = block["filter.short_filter_weight"][:, 0]
    padded = F.pad(z, (0, 0, 2, 0))
    z = sum(padded[j : j + len(z)] * taps[:, j] for j in range(3)) + block["filter.short_filter_bias"]
    q, k, v = z.view(len(x), HEADS, 3, -1).transpose(1, 2).flatten(2).unbind(1)
    poles, residues = (torch.view_as_complex(block[f"filter.{name}"][:, :, 0]) for name in ("poles", "residues"))
    modes, outputs = torch.zeros_like(poles), []
    for u in k * v:
        modes = poles * modes + u[:, None]
        outputs.append((residues * modes).sum(1).real + block["filter.D"] * u)
    return (q * torch.stack(outputs)) @ block["out_filter_dense.weight"].T + block["out_filter_dense.bias"]


def written_out(weights: dict[str, Tensor], text: Tensor, factor: float = 1.0) -> Tensor:
    """Logits (seqlen, vocab) of one sequence, in float64."""
    weights = {name.removeprefix("backbone."): t.double() for name, t in weights.items()}
    x = weights["embedding_layer.weight"][text]
    for i in range(CONFIG["num_layers"]):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in weights.items() if name.startswith(f"blocks.{i}.")}
        y = norm(x, block["pre_norm.scale"])
        x = x + (attention(y, block, factor) if i in CONFIG["attn_layer_idxs"] else hyena(y, block))
        y = norm(x, block["post_norm.scale"])
        hidden = F.silu(y @ block["mlp.l1.weight"].T) * (y @ block["mlp.l2.weight"].T)
        x = x + hidden @ block["mlp.l3.weight"].T
    return norm(x, weights["norm.scale"]) @ weights["unembed.weight"].T


def tokens(seqlen: int) -> Tensor:
    return torch.randint(0, VOCAB, (seqlen,), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("seqlen", [1, 40, 700])
@torch.no_grad()
def test_has_the_logits_of_the_formulas(seqlen: int, tmp_path: Path) -> None:
    wanted = written_out(written(tmp_path), tokens(seqlen))
    assert relative_error(from_hf(tmp_path)(tokens(seqlen)[None])[0], wanted) < 1e-5


@torch.no_grad()
def test_positions_that_are_stretched(tmp_path: Path) -> None:
    weights = written(tmp_path, use_interpolated_rotary_pos_emb=True, rotary_emb_scaling_factor=4.0)
    found = from_hf(tmp_path)(tokens(40)[None])[0]
    assert relative_error(found, written_out(weights, tokens(40), factor=4.0)) < 1e-5
    assert relative_error(found, written_out(weights, tokens(40))) > 1e-3


@torch.no_grad()
def test_generates_from_states_that_do_not_grow(tmp_path: Path) -> None:
    weights, wanted = written(tmp_path), []
    prompts = [tokens(9), tokens(5)]
    for prompt in prompts:
        text = prompt
        for _ in range(6):
            text = torch.cat([text, written_out(weights, text)[-1].argmax()[None]])
        wanted.append(text[len(prompt) :].tolist())
    assert continue_prompts(from_hf(tmp_path), prompts, 6) == wanted


@torch.no_grad()
def test_poles_stay_exact_beside_weights_in_bfloat16(tmp_path: Path) -> None:
    """As the checkpoint is published."""
    weights = written(tmp_path)
    exact = {name: t if "poles" in name or "residues" in name else t.bfloat16() for name, t in weights.items()}
    save_file(exact, tmp_path / "model.safetensors")
    model = from_hf(tmp_path)
    assert model.backbone.layers[0].filter.log_poles.dtype == torch.float32
    assert relative_error(model(tokens(300)[None])[0], written_out(exact, tokens(300))) < 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hyena_filter_groups": 2}, "hyena_filter_groups is 2; the layers here know 1 alone"),
        ({"mha_out_proj_bias": True}, "mha_out_proj_bias is True; the layers here know False alone"),
        ({"smeared_gqa": True}, "smeared_gqa is True"),
        ({"state_size": 2}, r"(?s)does not fit the weights: .*filter\.log_poles"),
    ],
)
def test_refuses_by_name(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path)


def test_is_read_alone(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ValueError, match=r"none of llama, .* has these layers"):
        to_hf(from_hf(tmp_path))
