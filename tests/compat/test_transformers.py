"""Small models of transformers, randomly initialised, against their own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import relative_error
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (madkernels[hf])")

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
    ids, losses, logits = tokens(2, 30), [], []
    for model in pair:
        out = model(ids, labels=ids)
        out.loss.backward()
        losses.append(out.loss)
        logits.append(out.logits)
    assert relative_error(logits[1], logits[0]) < 1e-5
    for (name, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or (a.grad - b.grad).abs().max() < 1e-4 * a.grad.abs().max() + 1e-7, name


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
