"""Small models of transformers, randomly initialised: enabled against disabled, which is their own torch-only path."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checks import relative_error
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (madkernels[hf])")

from madkernels import compat  # noqa: E402
from madkernels.compat import transformers as interfaces, transformers_models as models  # noqa: E402

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
LAYERS = {"num_hidden_layers": 3, "attn_layer_offset": 1, "attn_layer_period": 3}
MODELS: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8, "use_conv_bias": False},
    "Mamba2": {"state_size": 8, "num_heads": 12, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "Jamba": HEADS | LAYERS | {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 5},
    "Bamba": HEADS | {
        "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_n_groups": 2,
        "mamba_d_state": 8, "mamba_chunk_size": 8,
    },
    "Llama": HEADS,
    "Mistral": HEADS | {"sliding_window": 7},
    "Mixtral": HEADS | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
}  # fmt: skip
USES = {  # the functions of ours that a model's forward is made of
    "Mamba": {"causal_conv1d_fn", "selective_scan_fn"},
    "FalconMamba": {"causal_conv1d_fn", "selective_scan_fn"},
    "Mamba2": {"causal_conv1d_fn", "mamba_chunk_scan_combined"},
    "Jamba": {"causal_conv1d_fn", "selective_scan_fn", "attention", "moe_mlp"},
    "Bamba": {"causal_conv1d_fn", "mamba_chunk_scan_combined", "attention"},
    "Llama": {"attention"},
    "Mistral": {"attention"},
    "Mixtral": {"attention", "moe_mlp"},
}


@pytest.fixture(autouse=True)
def disabled() -> Iterator[None]:
    yield
    compat.disable()


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def make(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES | MODELS[name] | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config)
    with torch.no_grad():
        for kind, t in model.named_parameters():  # biases, norms and skips begin at 0 or 1
            if t.dim() == 1:
                t += 0.1 * torch.randn_like(t)
            elif "A_log" not in kind:
                t *= 3  # so that tokens differ
    return model.to(dtype).eval()


def tokens(batch: int, seqlen: int) -> Tensor:
    return torch.randint(3, 61, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def padded() -> tuple[Tensor, Tensor]:
    """Rows of 20, 11 and 1 tokens, padded at the left, and which are there."""
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, count in ((1, 9), (2, 19)):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


def counted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The functions of ours that are called from here on."""
    called: set[str] = set()
    for module in (models, interfaces):
        for function in {*USES["Jamba"], *USES["Bamba"], "selective_state_update", "causal_conv1d_update", "attention_step"}:
            if hasattr(module, function):
                own = getattr(module, function)
                monkeypatch.setattr(
                    module, function, lambda *a, own=own, function=function, **o: called.add(function) or own(*a, **o)
                )
    return called


def both(function: Any) -> tuple[Any, Any]:
    """What it returns disabled, and enabled."""
    compat.disable()
    wanted = function()
    compat.enable("transformers")
    return wanted, function()


def loss_and_gradients(model: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {kind: t.grad.clone() for kind, t in model.named_parameters() if t.grad is not None}


@pytest.mark.parametrize("rows", ["whole", "padded"])
def test_training(name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients in training mode, beyond windows and chunks; each op is really called."""
    called = counted(monkeypatch)
    model = make(name).train()
    ids, mask = (tokens(2, 30), None) if rows == "whole" else padded()
    (wanted, theirs), (found, ours) = both(lambda: loss_and_gradients(model, ids, mask))
    there = slice(None) if mask is None else mask.bool()
    assert called == USES[name]
    assert relative_error(found[there], wanted[there]) < 1e-5
    assert ours.keys() == theirs.keys()
    for kind, gradient in theirs.items():
        assert (ours[kind] - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-7, kind


@torch.no_grad()
def test_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left-padded rows, greedily and with a cache: token for token."""
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "output_logits": True}
    model = make(name)
    called = counted(monkeypatch)
    wanted, found = both(lambda: model.generate(ids, return_dict_in_generate=True, **options))
    assert torch.equal(found.sequences, wanted.sequences)
    assert relative_error(torch.stack(found.logits), torch.stack(wanted.logits)) < 1e-5
    if "amba" in name:
        assert {"selective_state_update", "causal_conv1d_update"} <= called


@torch.no_grad()
def test_a_cache_continued(name: str) -> None:
    """A prompt, several tokens more, and one after the other."""
    model, ids = make(name), tokens(2, 24)

    def run() -> Tensor:
        cache, logits = None, []
        for begin, end in ((0, 9), (9, 14), (14, 15), (15, 16), (16, 24)):
            out = model(ids[:, begin:end], use_cache=True, **({} if cache is None else {"cache": cache}))
            cache = out.cache
            logits.append(out.logits)
        return torch.cat(logits, 1)

    wanted, found = both(run)
    assert relative_error(found, wanted) < 1e-5


@torch.no_grad()
def test_bfloat16_is_as_near_as_theirs(name: str) -> None:
    ids, mask = padded()
    model, there = make(name, torch.bfloat16), mask.bool()
    reference = copy.deepcopy(model).float()(ids, attention_mask=mask).logits[there]  # of the same, rounded weights
    wanted, found = both(lambda: model(ids, attention_mask=mask).logits[there].float())
    assert relative_error(found, reference) < 1.5 * relative_error(wanted, reference)
    sequences = both(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))[1]
    assert sequences.shape == (3, 24)


def test_autocast(name: str) -> None:
    """Through both directions, as near to float32 as theirs."""
    model, ids = make(name).train(), tokens(2, 20)
    reference, _ = loss_and_gradients(model, ids, None)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_and_gradients(model, ids, None)[0].float()

    wanted, found = both(run)
    assert relative_error(found, reference) < 2 * relative_error(wanted, reference)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Mixtral", "Jamba"])
@torch.no_grad()
def test_packed_documents_by_their_positions(name: str) -> None:
    ids, positions = tokens(1, 24), torch.cat([torch.arange(n) for n in (9, 1, 14)])[None]
    model = make(name)
    wanted, found = both(lambda: model(ids, position_ids=positions, use_cache=False).logits)
    assert relative_error(found, wanted) < 1e-5


@torch.no_grad()
def test_documents_packed_by_seq_idx_are_kept_apart() -> None:
    """Which transformers alone refuses; each is as it is by itself."""
    model, ids, lengths = make("Bamba"), tokens(1, 24), (9, 1, 14)
    documents = ids.split(lengths, 1)
    wanted = torch.cat([model(document, use_cache=False).logits for document in documents], 1)
    which = torch.repeat_interleave(torch.tensor(lengths))[None].int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with pytest.raises(ValueError, match="packed sequences"):
        model(ids, position_ids=positions, seq_idx=which, use_cache=False)
    compat.enable("transformers")
    assert relative_error(model(ids, position_ids=positions, seq_idx=which, use_cache=False).logits, wanted) < 1e-5


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Mamba"])
@torch.no_grad()
def test_caches_of_fixed_size(name: str) -> None:
    """Of which keys behind the last query are empty."""
    model, (ids, mask) = make(name), padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    wanted, found = both(lambda: model.generate(ids, **options))
    assert torch.equal(found, wanted)

    def run() -> Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        parts = [model(part, cache=cache, use_cache=True).logits for part in tokens(2, 20).split((12, 7, 1), 1)]
        return torch.cat(parts, 1)

    wanted, found = both(run)
    assert relative_error(found, wanted) < 1e-5


def test_compiled() -> None:
    """What is compiled follows too."""
    torch._dynamo.reset()
    model, ids = make("Llama", num_hidden_layers=1), tokens(2, 12)
    compiled = torch.compile(model, backend="eager")
    wanted, found = both(lambda: compiled(ids, use_cache=False).logits)
    assert relative_error(found, wanted) < 1e-5


def test_what_the_ops_have_not_stays_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in attention, other activations, and what was asked for by name."""
    ids, called = tokens(2, 10), counted(monkeypatch)
    dropping, other, asked = make("Llama", attention_dropout=0.3).train(), make("Mamba", hidden_act="gelu"), make("Mixtral")
    asked.set_attn_implementation("eager")
    asked.set_experts_implementation("eager")

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        return [model(ids, use_cache=False).logits.detach() for model in (dropping, asked, other)]

    wanted, found = both(run)
    assert called == {"selective_scan_fn"}
    for one, another in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(one, another)
    assert relative_error(found[2], wanted[2]) < 1e-5
    dropping.eval()
    mask = padded()[1]
    wanted, found = both(lambda: dropping(padded()[0], attention_mask=mask).logits[mask.bool()].detach())
    assert relative_error(found, wanted) < 1e-5


def test_steps_that_may_need_derivatives_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoding steps of the ops have none, and drop nothing in silence."""
    model, ids, called = make("Mamba"), tokens(2, 6), counted(monkeypatch)

    def run() -> Tensor:
        with torch.no_grad():
            cache = model(ids, use_cache=True).cache
        logits: Tensor = model(ids[:, :1], cache=cache, use_cache=True).logits
        return logits

    wanted, found = both(run)
    assert called == USES["Mamba"]
    assert found.requires_grad
    assert relative_error(found, wanted) < 1e-5


def variables() -> dict[tuple[str, str], Any]:
    """All functions of the families' modules and of their classes, and where implementations are looked up."""
    found: dict[tuple[str, str], Any] = {}
    for family in models.FAMILIES:
        module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["_"])
        for owner in (module, *(kind for kind in vars(module).values() if isinstance(kind, type))):
            found |= {(f"{family} {owner.__name__}", name): value for name, value in vars(owner).items()}
    for name in ("sdpa", "eager"):
        found["attention", name] = transformers.AttentionInterface._global_mapping.get(name)
    return found


def test_disable_restores_every_function() -> None:
    before = variables()
    compat.enable("transformers")
    once = variables()
    changed = {key for key in before if once[key] is not before[key]}
    assert len(changed) == sum(len(names) for names in models.FAMILIES.values())
    compat.enable("transformers")
    assert all(once[key] is value for key, value in variables().items())
    compat.disable("transformers")
    assert all(before[key] is value for key, value in variables().items())
    compat.disable()


def test_models_before_and_after_enabling_are_alike() -> None:
    ids, before = tokens(2, 10), make("Mixtral")
    configuration = copy.deepcopy(before.config.to_dict())
    compat.enable("transformers")
    after = make("Mixtral")
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert after.config.to_dict() == configuration


def test_refuses_names_it_does_not_know() -> None:
    for function in (compat.enable, compat.disable):
        with pytest.raises(ValueError, match=r"unknown library 'Transformer'; there are transformers; did you mean transf"):
            function("Transformer")


def test_refuses_versions_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("transformers.models.mixtral.modeling_mixtral", fromlist=["_"])
    monkeypatch.delattr(module, "create_causal_mask")
    before = variables()
    with pytest.raises(ValueError, match=r"transformers .* has no transformers.models.mixtral.*create_causal_mask: enable"):
        compat.enable("transformers")
    assert all(before[key] is value for key, value in variables().items())
