"""Llama, Mistral and Mixtral: rotary attention with grouped heads, SwiGLU or a mixture of them."""

from __future__ import annotations

from collections.abc import Container
from functools import partial
from typing import Any

import torch

from madkernels.models.layers.attention import Attention
from madkernels.models.layers.moe import MoE
from madkernels.models.layers.swiglu import SwiGLU
from madkernels.models.lm import HybridLM
from madkernels.models.published.checkpoint import Config
from madkernels.models.published.family import Entry, Family, only, repeated, rows, same, stack
from madkernels.models.spec import Architecture, LayerSpec, Value, layer_spec

# Where a configuration does not say them.
THETA = {"mixtral": 1e6}  # 1e4 in the others
WINDOW = {"mistral": 4096}  # none in the others


def _read(config: Config) -> tuple[Architecture, dict[str, Any]]:
    config.expect("hidden_act", "silu")
    hidden = config.required("intermediate_size")
    if config.required("model_type") == "mixtral":
        experts, top_k = config.required("num_local_experts"), config.required("num_experts_per_tok")
        mixer = layer_spec("moe", {"experts": experts, "top_k": top_k, "hidden": hidden})
    else:
        mixer = layer_spec("swiglu", {"hidden": hidden, "bias": config.get("mlp_bias", False)})
    arch = stack(config.required("num_hidden_layers"), _read_attention(config), mixer)
    tied = config.get("tie_word_embeddings", False)
    return arch, {"tied": tied, "unembedding_bias": False, "norm_eps": config.required("rms_norm_eps")}


def _read_attention(config: Config) -> LayerSpec:
    heads = config.required("num_attention_heads")
    options: dict[str, Value] = {
        "heads": heads,
        "kv_heads": _unless(heads, config.get("num_key_value_heads", heads)),
        "head_dim": _unless(config.required("hidden_size") // heads, config.get("head_dim", 0)),
        "bias": config.get("attention_bias", False),
        **_read_rope(config),
    }
    model_type = config.required("model_type")
    window = config.values.get("sliding_window", WINDOW.get(model_type))
    if window is None or model_type == "llama":
        return layer_spec("attention", options)
    if window < 2:
        raise ValueError(f"{config.where}: sliding_window is {window}; expected 2 at least")
    return layer_spec("sliding-attention", options | {"window": window - 1})


def _unless(usual: int, value: int) -> int:
    """0, which stands for the usual value, or another one."""
    return 0 if value == usual else value


def _read_rope(config: Config) -> dict[str, Value]:
    rope = Config(config.get("rope_parameters", None) or config.get("rope_scaling", None) or {}, config.where)
    usual = THETA.get(config.required("model_type"), 1e4)
    options: dict[str, Value] = {"rope_theta": float(rope.get("rope_theta", config.get("rope_theta", usual)))}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1:
        raise ValueError(f"{config.where}: partial_rotary_factor is not 1; positions here turn whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return options
    if kind not in ("linear", "llama3"):
        raise ValueError(f"{config.where}: rope_type {kind!r} is not known; default, linear and llama3 are")
    options["rope_factor"] = float(rope.required("factor"))
    if kind == "llama3":
        options["original_length"] = int(rope.required("original_max_position_embeddings"))
        options |= {key: float(rope.required(key)) for key in ("low_freq_factor", "high_freq_factor")}
    return options


def _entries(model: HybridLM, names: Container[str], config: Config) -> list[Entry]:
    found = [same("embedding.weight", "model.embed_tokens.weight"), same("backbone.norm.weight", "model.norm.weight")]
    if not model.tied:
        found.append(same("unembedding.weight", "lm_head.weight"))
    for i, layer in enumerate(model.backbone.layers):
        ours, theirs = f"backbone.layers.{i}", f"model.layers.{i // 2}"
        if isinstance(layer, Attention):
            found.append(same(f"backbone.norms.{i}.weight", f"{theirs}.input_layernorm.weight"))
            found += _attention(layer, ours, f"{theirs}.self_attn")
            continue
        found.append(same(f"backbone.norms.{i}.weight", f"{theirs}.post_attention_layernorm.weight"))
        if isinstance(layer, SwiGLU):
            found += _swiglu(layer, ours, f"{theirs}.mlp")
        elif isinstance(layer, MoE):
            in_memory = f"{theirs}.mlp.experts.gate_up_proj" in names
            found += _fused(ours, f"{theirs}.mlp") if in_memory else _moe(layer, ours, f"{theirs}.block_sparse_moe")
    return found


def _kinds(bias: object) -> tuple[str, ...]:
    return ("weight",) if bias is None else ("weight", "bias")


def _attention(layer: Attention, ours: str, theirs: str) -> list[Entry]:
    kv = layer.kv_heads * layer.head_dim
    sizes = {"q": layer.heads * layer.head_dim, "k": kv, "v": kv}
    found = []
    for kind in _kinds(layer.qkv.bias):
        found.append(rows(f"{ours}.qkv.{kind}", {f"{theirs}.{name}_proj.{kind}": size for name, size in sizes.items()}))
        found.append(same(f"{ours}.out.{kind}", f"{theirs}.o_proj.{kind}"))
    return found


def _swiglu(layer: SwiGLU, ours: str, theirs: str) -> list[Entry]:
    found = []
    for kind in _kinds(layer.down.bias):
        found.append(
            rows(f"{ours}.gate_up.{kind}", {f"{theirs}.{name}_proj.{kind}": layer.hidden for name in ("gate", "up")})
        )
        found.append(same(f"{ours}.down.{kind}", f"{theirs}.down_proj.{kind}"))
    return found


def _moe(layer: MoE, ours: str, theirs: str) -> list[Entry]:
    """As checkpoints have it: w1 (gate), w3 (up) and w2 (down) of each expert."""
    prefixes = [f"{theirs}.experts.{number}" for number in range(layer.experts)]
    gate_up = tuple(f"{prefix}.{name}.weight" for prefix in prefixes for name in ("w1", "w3"))
    down = tuple(f"{prefix}.w2.weight" for prefix in prefixes)
    return [
        same(f"{ours}.router.weight", f"{theirs}.gate.weight"),
        Entry(
            f"{ours}.gate_up", gate_up,
            lambda tensors: torch.cat(list(tensors)).unflatten(0, (layer.experts, -1)),  # type: ignore[no-untyped-call]
            lambda t: [half for expert in t for half in expert.chunk(2)],
        ),
        Entry(f"{ours}.down", down, lambda tensors: torch.stack(list(tensors)), lambda t: list(t)),
    ]  # fmt: skip


def _fused(ours: str, theirs: str) -> list[Entry]:
    """As a model of transformers has it in memory."""
    return [
        same(f"{ours}.router.weight", f"{theirs}.gate.weight"),
        same(f"{ours}.gate_up", f"{theirs}.experts.gate_up_proj"),
        same(f"{ours}.down", f"{theirs}.experts.down_proj"),
    ]


def _describe(model_type: str, attention: tuple[str, ...], mixer: str, model: HybridLM) -> dict[str, Any] | None:
    found = None
    for name in attention:
        found = found or repeated(model.arch, name, mixer)
    if found is None:
        return None
    of_attention, of_mixer = found
    heads, window = of_attention["heads"], of_attention.get("window")
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "num_hidden_layers": len(model.arch.layers) // 2,
        "num_attention_heads": heads,
        "num_key_value_heads": of_attention["kv_heads"] or heads,
        "head_dim": of_attention["head_dim"] or model.dim // int(heads),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        **_rope(of_attention),
    }
    if model.float32_residual:
        raise ValueError(f"the residual is in float32; a {model_type} has it in the dtype of its parameters")
    if mixer == "moe":
        only("moe", of_mixer, shared=0, sigmoid=False, balance=0.0, dense=False)
        config |= {"num_local_experts": of_mixer["experts"], "num_experts_per_tok": of_mixer["top_k"]}
    if model_type == "llama":
        config |= {"attention_bias": of_attention["bias"], "mlp_bias": of_mixer["bias"]}
    else:
        only(attention[0], of_attention, bias=False)
        config["sliding_window"] = None if window is None else int(window) + 1
    layer = model.backbone.layers[1]
    assert isinstance(layer, (SwiGLU, MoE))
    return config | {"intermediate_size": layer.hidden}


def _rope(options: dict[str, Value]) -> dict[str, Any]:
    """Under the names that old and new versions of transformers read."""
    theta, factor = {"rope_theta": options["rope_theta"]}, {"factor": options["rope_factor"]}
    if original := int(options["original_length"]):
        stretched = {key: options[key] for key in ("low_freq_factor", "high_freq_factor")}
        longest = {"max_position_embeddings": int(original * max(options["rope_factor"], 1))}
        scaling = {"rope_type": "llama3", **factor, **stretched, "original_max_position_embeddings": original}
        return {**theta, **longest, "rope_scaling": scaling}
    return theta if options["rope_factor"] == 1 else {**theta, "rope_scaling": {"rope_type": "linear", **factor}}


LLAMA = Family("llama", _read, _entries, partial(_describe, "llama", ("attention",), "swiglu"))
MISTRAL = Family("mistral", _read, _entries, partial(_describe, "mistral", ("sliding-attention",), "swiglu"))
MIXTRAL = Family("mixtral", _read, _entries, partial(_describe, "mixtral", ("attention", "sliding-attention"), "moe"))
