"""Mamba, Falcon Mamba and Mamba-2."""

from __future__ import annotations

import math
from collections.abc import Container
from functools import partial
from typing import Any

from madkernels.models.layers.mamba import Mamba
from madkernels.models.layers.mamba2 import Mamba2
from madkernels.models.lm import HybridLM
from madkernels.models.published.checkpoint import Config
from madkernels.models.published.family import Entry, Family, only, repeated, same, stack, taps
from madkernels.models.spec import Architecture, Value, layer_spec

NAMES = {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}
NORM_EPS = 1e-6  # of Falcon Mamba's projections, where a configuration does not say it


def _read(config: Config) -> tuple[Architecture, dict[str, Any]]:
    kind, dim = config.required("model_type"), config.required("hidden_size")
    config.expect("hidden_act", "silu")
    options: dict[str, Value] = {
        "dstate": config.required("state_size"),
        "expand": config.get("expand", 2),
        "width": config.get("conv_kernel", 4),
        "bias": config.get("use_bias", False),
        "conv_bias": config.get("use_conv_bias", True),
    }
    norm_eps = config.get("layer_norm_epsilon", 1e-5)
    if kind == "mamba2":
        options |= _read_heads(config) | {"norm_eps": norm_eps}
    else:
        config.expect("intermediate_size", options["expand"] * dim)
        rank, usual = config.get("time_step_rank", "auto"), math.ceil(dim / 16)
        options["rank"] = 0 if rank in ("auto", usual) else rank
    if kind == "falcon_mamba":
        options["projection_norm_eps"] = config.get("mixer_rms_eps", NORM_EPS)
    arch = stack(config.required("num_hidden_layers"), layer_spec("mamba2" if kind == "mamba2" else "mamba", options))
    return arch, {
        "tied": config.get("tie_word_embeddings", kind != "mamba2"),
        "unembedding_bias": False,
        "norm_eps": norm_eps,
        "float32_residual": config.get("residual_in_fp32", True),
    }


def _read_heads(config: Config) -> dict[str, Value]:
    least, most = config.get("time_step_limit", (0.0, math.inf))
    return {
        "head_dim": config.get("head_dim", 64),
        "groups": config.get("n_groups", 8),
        "delta_min": float(least),
        "delta_max": float(most),
    }


def _entries(model: HybridLM, names: Container[str], config: Config) -> list[Entry]:
    embedding = "backbone.embedding.weight"  # as the first checkpoints have it
    embedding = embedding if embedding in names else "backbone.embeddings.weight"
    found = [same("embedding.weight", embedding), same("backbone.norm.weight", "backbone.norm_f.weight")]
    if not model.tied:
        found.append(same("unembedding.weight", "lm_head.weight"))
    for i, layer in enumerate(model.backbone.layers):
        ours, theirs = f"backbone.layers.{i}", f"backbone.layers.{i}.mixer"
        found.append(same(f"backbone.norms.{i}.weight", f"backbone.layers.{i}.norm.weight"))
        found += _mamba(layer, ours, theirs) if isinstance(layer, Mamba) else _mamba2(ours, theirs)
        assert isinstance(layer, (Mamba, Mamba2))
        own = {name for name, _ in layer.named_parameters()}
        for name in ("A_log", "D", "in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"):
            found += [same(f"{ours}.{name}", f"{theirs}.{name}")] if name in own else []
        bias = "conv_bias" if isinstance(layer, Mamba) else "conv.bias"
        found += [same(f"{ours}.{bias}", f"{theirs}.conv1d.bias")] if bias in own else []
    return found


def _mamba(layer: Mamba, ours: str, theirs: str) -> list[Entry]:
    return [
        taps(f"{ours}.conv_weight", f"{theirs}.conv1d.weight"),
        same(f"{ours}.x_proj.weight", f"{theirs}.x_proj.weight"),
        same(f"{ours}.delta_weight", f"{theirs}.dt_proj.weight"),
        same(f"{ours}.delta_bias", f"{theirs}.dt_proj.bias"),
    ]


def _mamba2(ours: str, theirs: str) -> list[Entry]:
    return [
        taps(f"{ours}.conv.weight", f"{theirs}.conv1d.weight"),
        same(f"{ours}.delta_bias", f"{theirs}.dt_bias"),
        same(f"{ours}.norm.weight", f"{theirs}.norm.weight"),
    ]


def _describe(kind: str, model: HybridLM) -> dict[str, Any] | None:
    found = repeated(model.arch, "mamba2" if kind == "mamba2" else "mamba")
    if found is None or (kind != "mamba2" and (kind == "falcon_mamba") != bool(found[0]["projection_norm_eps"])):
        return None
    (options,) = found
    layer = model.backbone.layers[0]
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [f"{NAMES[kind]}ForCausalLM"],
        "num_hidden_layers": len(model.arch.layers),
        "state_size": options["dstate"],
        "expand": options["expand"],
        "conv_kernel": options["width"],
        "use_bias": options["bias"],
        "use_conv_bias": options["conv_bias"],
        "layer_norm_epsilon": model.norm_eps,
        "residual_in_fp32": model.float32_residual,
        "hidden_act": "silu",
    }
    if isinstance(layer, Mamba2):
        only("mamba2", options, norm_eps=model.norm_eps, norm_before_gate=False, D_per_channel=False)
        limits = [options["delta_min"], options["delta_max"]]
        heads = {"num_heads": layer.heads, "head_dim": layer.head_dim, "n_groups": layer.groups}
        return config | heads | {"time_step_limit": limits}
    assert isinstance(layer, Mamba)
    norms = {"mixer_rms_eps": options["projection_norm_eps"]} if kind == "falcon_mamba" else {}
    return config | norms | {"time_step_rank": layer.rank, "intermediate_size": layer.inner}


MAMBA, FALCON_MAMBA, MAMBA2 = (Family(kind, _read, _entries, partial(_describe, kind)) for kind in NAMES)
