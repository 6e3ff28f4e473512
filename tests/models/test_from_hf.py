"""Small models of transformers, trained a little and saved by it, against what `from_hf` and `to_hf` make of them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

from madkernels.models import HybridLM, counting, from_hf, to_hf
from madkernels.models.generation import continue_prompts

transformers = pytest.importorskip("transformers", reason="transformers is not installed (madkernels[hf])")

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 3}
WITH_HEADS = SIZES | {"intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2}
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", WITH_HEADS),
    "llama 3": ("Llama", WITH_HEADS | {"rope_parameters": STRETCHED, "head_dim": 12, "tie_word_embeddings": True}),
    "llama, biases": ("Llama", WITH_HEADS | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
    "llama, linear": ("Llama", WITH_HEADS | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", WITH_HEADS | {"sliding_window": 7, "rms_norm_eps": 0.01, "attention_dropout": 0.1}),
    "mixtral": ("Mixtral", WITH_HEADS | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, window": ("Mixtral", WITH_HEADS | {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 9}),
    "mamba": ("Mamba", SIZES | {"state_size": 8}),
    "mamba, biases": (
        "Mamba",
        SIZES | {"use_bias": True, "use_conv_bias": False, "time_step_rank": 5, "tie_word_embeddings": False},
    ),
    "falcon mamba": ("FalconMamba", SIZES | {"state_size": 8, "mixer_rms_eps": 1e-3}),
    "mamba2": ("Mamba2", SIZES | {"num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 16}),
    "mamba2, limits": (
        "Mamba2",
        SIZES
        | {"num_heads": 12, "head_dim": 8, "n_groups": 3, "state_size": 8, "chunk_size": 16, "use_bias": True}
        | {"time_step_limit": (0.01, 0.1), "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3},
    ),
}
SHARD = "40KB"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tokens(batch: int = 2, seqlen: int = 50) -> Tensor:
    return torch.randint(0, 61, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def fresh(case: str) -> Any:
    name, options = CASES[case]
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options))


def loss(logits: Tensor, text: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


@cache
def trained(case: str) -> Any:
    """After some steps with weight decay, from a start whose biases and norms are not all alike."""
    model, text = fresh(case), tokens(2, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(text, use_cache=False).logits, text).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, text: Tensor) -> Tensor:
    logits: Tensor = model(text, use_cache=False).logits
    return logits


@pytest.fixture
def folder(case: str, tmp_path: Path) -> Path:
    trained(case).save_pretrained(tmp_path / "theirs", max_shard_size=SHARD)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    return tmp_path / "theirs"


@torch.no_grad()
def test_a_folder_has_the_same_logits(case: str, folder: Path) -> None:
    model = from_hf(folder)
    assert not model.training
    assert relative_error(model(tokens()), logits_of(trained(case), tokens())) < 1e-5
    assert counting.params(model) == trained(case).num_parameters()
    from_object = from_hf(trained(case))
    assert str(from_object.arch) == str(model.arch)
    for name, parameter in from_object.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name]), name


def test_gradients_are_the_same(case: str) -> None:
    theirs, text = copy.deepcopy(trained(case)), tokens(2, 16)
    loss(theirs(text, use_cache=False).logits, text).backward()
    ours = from_hf(theirs)
    loss(ours(text), text).backward()
    with torch.no_grad():  # their gradients as parameters, so that they are brought to our names and shapes
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    for name, wanted in from_hf(theirs).named_parameters():
        assert relative_error(ours.get_parameter(name).grad, wanted) < 1e-4, name


@torch.no_grad()
def test_greedy_generation_is_the_same(case: str) -> None:
    """Token for token, with prompts of unequal lengths as one batch, beyond windows."""
    theirs, prompts = trained(case), [tokens()[0, :11], tokens()[1, :4]]
    wanted = []
    for prompt in prompts:
        text = prompt[None]
        for _ in range(5):
            text = torch.cat([text, logits_of(theirs, text)[:, -1:].argmax(-1)], 1)
        wanted.append(text[0, len(prompt) :].tolist())
    ours = from_hf(theirs)
    assert continue_prompts(ours, prompts, 5) == wanted
    assert ours.generate(prompts[0][None], 5)[0, 11:].tolist() == wanted[0]


@torch.no_grad()
def test_back_again(case: str, folder: Path, tmp_path: Path) -> None:
    """As a folder and as a model, tensor by tensor."""
    to_hf(from_hf(folder), tmp_path / "ours", eos_token_id=5)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.eos_token_id == 5
    assert type(loaded) is type(trained(case))
    for model in (loaded.eval(), to_hf(from_hf(folder))):
        assert relative_error(logits_of(model, tokens(2, 20)), logits_of(trained(case), tokens(2, 20))) < 1e-6
        for name, parameter in trained(case).state_dict().items():
            assert torch.equal(model.state_dict()[name], parameter), name


@pytest.mark.parametrize("case", ["llama", "llama 3", "llama, linear", "mixtral"])
def test_frequencies_are_the_same_bits(case: str) -> None:
    """So that angles are the same however long a sequence is."""
    theirs, ours = fresh(case), from_hf(fresh(case)).backbone.layers[0]
    assert torch.equal(ours.rope.frequencies(ours.head_dim, torch.zeros(1)), theirs.model.rotary_emb.inv_freq)


# ---- our own models as theirs

OURS = {
    "Llama": "2*(attention:heads=4,kv_heads=2,bias=false swiglu:hidden=40)",
    "Mistral": "2*(sliding-attention:heads=4,bias=false,window=5,rope_theta=100 swiglu)",
    "Mixtral": "2*(attention:heads=4,bias=false moe:experts=3,hidden=16)",
    "Mamba": "2*mamba:width=3,expand=1",
    "FalconMamba": "2*mamba:projection_norm_eps=0.01",
    "Mamba2": "2*mamba2:head_dim=16,dstate=8,groups=2,delta_max=0.1",
}


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.bfloat16), (True, torch.float32)], ids=str)
@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_a_model_of_ours(name: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = HybridLM(OURS[name], vocab_size=61, dim=32, tied=tied, unembedding_bias=False).to(dtype)
    to_hf(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    assert theirs.dtype == dtype
    found = relative_error(logits_of(theirs, tokens()), ours.float()(tokens()))
    assert found < (1e-5 if dtype == torch.float32 else 0.03)


@torch.no_grad()
def test_a_residual_in_float32() -> None:
    """In bfloat16 it is nearer to the exact logits than one in bfloat16, here as there."""
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES | {"state_size": 4, "num_hidden_layers": 12}))
    theirs.backbone.embeddings.weight.mul_(30)
    theirs = theirs.bfloat16().eval()
    ours, exact = from_hf(theirs), from_hf(theirs, dtype=torch.float64)(tokens())
    assert ours.float32_residual
    found, wanted = relative_error(ours(tokens()), exact), relative_error(logits_of(theirs, tokens()), exact)
    ours.backbone.float32_residual = False
    assert max(found, wanted) < 0.7 * relative_error(ours(tokens()), exact)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("attention:heads=4 swiglu", {}, "the unembedding has a bias, which no published family has"),
        ("attention:heads=4 mlp", {"tied": True}, "none of llama, mistral, mixtral, mamba, falcon_mamba, mamba2 has these"),
        ("mamba mamba:dstate=4", {"tied": True}, "layers differ, mamba:dstate=4 from mamba;"),
        ("attention:heads=4,bias=false moe:shared=1", {"tied": True}, "moe has shared=1; its published family has shared=0"),
        ("sliding-attention:heads=4 swiglu", {"tied": True}, "sliding-attention has bias=True; .* has bias=False alone"),
        ("mamba2:head_dim=16,D_per_channel=true", {"tied": True}, "mamba2 has D_per_channel=True"),
        ("mamba2:head_dim=16", {"tied": True, "norm_eps": 0.1}, "mamba2 has norm_eps=1e-05; .* has norm_eps=0.1 alone"),
        ("attention:heads=4 swiglu", {"tied": True, "float32_residual": True}, "the residual is in float32"),
    ],
)
def test_what_no_family_has(arch: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_hf(HybridLM(arch, vocab_size=61, dim=32, **options))


# ---- folders


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "lama"}, "model_type 'lama' is not known; expected one of llama, .*llama"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the layers here know 'silu' alone"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not known; default, linear and llama3"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "does not say 'original_max_position_embeddings'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"num_hidden_layers": 4}, "the weights lack model.layers.3.input_layernorm.weight"),
    ({"num_hidden_layers": 2}, "no place for these weights: model.layers.2"),
    ({"intermediate_size": 60}, "(?s)does not fit the weights: .*gate_up"),
    ({"hidden_size": None}, "does not say 'hidden_size'"),
    ({"attention_bias": True}, r"the weights lack model.layers.0.self_attn.q_proj.bias"),
    ({"tie_word_embeddings": True}, "embeddings are tied, and lm_head.weight is not the embedding"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: next(iter(value), None))
def test_refuses_by_name(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    fresh("llama").save_pretrained(tmp_path)
    changed(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path)


def test_refuses_folders_without_weights_and_files_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read: No such file"):
        from_hf(tmp_path)
    fresh("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        from_hf(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere.safetensors'; expected files of the folder"):
        from_hf(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        from_hf(tmp_path)


@torch.no_grad()
def test_a_folder_as_older_versions_wrote_it(tmp_path: Path) -> None:
    """rope_theta and rope_scaling on their own, frequencies among the weights, keys that came later missing."""
    theirs = fresh("llama 3").eval()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    for key in ("mlp_bias", "attention_bias"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, tmp_path / "model.safetensors")
    assert relative_error(from_hf(tmp_path)(tokens()), logits_of(theirs, tokens())) < 1e-5


def test_a_mistral_that_does_not_name_its_window(tmp_path: Path) -> None:
    fresh("mistral").save_pretrained(tmp_path)
    for window, expected in (("absent", 4095), (None, None), (7, 6)):
        config = json.loads((tmp_path / "config.json").read_text())
        config.pop("sliding_window", None)
        config |= {} if window == "absent" else {"sliding_window": window}
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = transformers.AutoConfig.from_pretrained(tmp_path).sliding_window
        assert dict(from_hf(tmp_path).arch.layers[0].options).get("window") == expected == (read and read - 1)


def test_a_folder_is_read_without_transformers(tmp_path: Path) -> None:
    fresh("mamba2").save_pretrained(tmp_path)
    code = (
        "import sys; from madkernels.models import from_hf, to_hf; "
        f"to_hf(from_hf({str(tmp_path)!r}), {str(tmp_path / 'back')!r}); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "back" / "model.safetensors").exists()


@torch.no_grad()
def test_saved_as_our_own(tmp_path: Path) -> None:
    """What came from a checkpoint is a model as any other."""
    model = from_hf(trained("mamba2, limits"))
    model.save_pretrained(tmp_path)
    assert torch.equal(HybridLM.from_pretrained(tmp_path)(tokens()), model(tokens()))
