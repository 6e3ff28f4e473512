"""Small models of transformers, randomly initialised, against their own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import relative_error
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (madkernels[hf])")

from madkernels import moe_mlp  # noqa: E402
from madkernels.compat import transformers as compat  # noqa: E402

SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Gemma2": {"head_dim": 12, "sliding_window": 6, "attn_logit_softcapping": 5.0},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "GptOss": {"head_dim": 8, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same model with eager attention and with ours."""
    compat.register()
    config = getattr(transformers, f"{request.param}Config")(**SIZES | MODELS[request.param])
    torch.manual_seed(0)
    models = []
    for name in ("eager", compat.NAME):
        model = getattr(transformers, f"{request.param}ForCausalLM")._from_config(config, attn_implementation=name)
        models.append(model.eval())
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 6, "num_key_value_heads": 6},
    "DeepseekV3": {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 20,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 6,
    },
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # its experts' gate is its own
}  # fmt: skip


def mixtures(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same model with transformers' loop over experts and with ours."""
    compat.register()
    config = getattr(transformers, f"{name}Config")(**SIZES | MIXTURES[name])
    torch.manual_seed(0)
    models = []
    for experts in ("eager", compat.NAME):
        kind = getattr(transformers, f"{name}ForCausalLM")
        models.append(
            kind._from_config(config, attn_implementation="eager", experts_implementation=experts).to(dtype).eval()
        )
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


def check_gradients(pair: tuple[Any, Any], ids: Tensor, tolerance: float) -> None:
    losses, logits = [], []
    for model in pair:
        out = model(ids, labels=ids)
        out.loss.backward()
        losses.append(out.loss)
        logits.append(out.logits)
    assert relative_error(logits[1], logits[0]) < tolerance
    for (name, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or (a.grad - b.grad).abs().max() < 10 * tolerance * a.grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(compat, "moe_mlp", lambda *args, **options: calls.append(1) or moe_mlp(*args, **options))
    check_gradients(mixtures(name), tokens(2, 30), 1e-5)
    assert bool(calls) == (name != "GptOss")


@torch.no_grad()
def test_mixtures_in_bfloat16_are_as_near_as_their_own() -> None:
    exact, _ = mixtures("Mixtral")
    wanted, (own, ours) = exact(tokens(2, 30)).logits, mixtures("Mixtral", torch.bfloat16)
    errors = [relative_error(model(tokens(2, 30)).logits.float(), wanted) for model in (own, ours)]
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_mixtures_generate(name: str) -> None:
    own, ours = (model.generate(tokens(2, 5), max_new_tokens=12, do_sample=False) for model in mixtures(name))
    assert torch.equal(own, ours)


def tokens(batch: int, seqlen: int) -> Tensor:
    return torch.randint(3, 61, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Rows of 20, 11 and 5 tokens, and which are there."""
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, count in ((1, 9), (2, 15)):
        where = slice(count) if side == "left" else slice(20 - count, None)
        ids[row, where], mask[row, where] = 0, 0
    return ids, mask


def test_forward_and_backward(pair: tuple[Any, Any]) -> None:
    """Longer than every window."""
    check_gradients(pair, tokens(2, 30), 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches(pair: tuple[Any, Any], side: str) -> None:
    ids, mask = padded(side)
    wanted, found = (model(ids, attention_mask=mask).logits for model in pair)
    assert relative_error(found[mask.bool()], wanted[mask.bool()]) < 1e-5


@torch.no_grad()
def test_packed_documents_by_their_positions(pair: tuple[Any, Any]) -> None:
    ids, positions = tokens(1, 24), torch.cat([torch.arange(n) for n in (9, 1, 14)])[None]
    wanted, found = (model(ids, position_ids=positions, use_cache=False).logits for model in pair)
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("rows", ["equal", "left"])
@torch.no_grad()
def test_generate(pair: tuple[Any, Any], rows: str) -> None:
    """Beyond every window, by the cache."""
    ids, mask = (tokens(2, 9), torch.ones(2, 9, dtype=torch.long)) if rows == "equal" else padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "output_logits": True}
    wanted, found = (model.generate(ids, return_dict_in_generate=True, **options) for model in pair)
    assert torch.equal(found.sequences, wanted.sequences)
    assert relative_error(torch.stack(found.logits), torch.stack(wanted.logits)) < 1e-5


@torch.no_grad()
def test_chunks_are_not_taken_for_a_window() -> None:
    compat.register()
    config = transformers.Llama4TextConfig(
        **SIZES | {"head_dim": 8}, attention_chunk_size=5, num_local_experts=2, intermediate_size_mlp=64
    )
    eager, ours = (
        transformers.Llama4ForCausalLM._from_config(config, attn_implementation=name).eval()
        for name in ("eager", compat.NAME)
    )
    ours.load_state_dict(eager.state_dict())
    assert relative_error(ours(tokens(2, 17)).logits, eager(tokens(2, 17)).logits) < 1e-5


def test_refuses_dropout() -> None:
    compat.register()
    config = transformers.LlamaConfig(**SIZES, attention_dropout=0.1)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=compat.NAME).train()
    with pytest.raises(ValueError, match="has no dropout: set attention_dropout to 0; it is 0"):
        model(tokens(1, 5))
