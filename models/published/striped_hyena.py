"""StripedHyena: modal Hyena and rotary attention with grouped heads, each followed by SwiGLU.

As togethercomputer/StripedHyena-Hessian-7B publishes it: norms have their eps within the root, as the fused norm of that
model's configuration; the projections of a Hyena block lie head by head, q, k and v of each, and poles as they are, not as
logarithms.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from madkernels.models.layers.attention import Attention
from madkernels.models.layers.hyena import Hyena
from madkernels.models.layers.swiglu import SwiGLU
from madkernels.models.lm import HybridLM
from madkernels.models.published.checkpoint import Config
from madkernels.models.published.family import Entry, Family, rows, same
from madkernels.models.spec import Architecture, layer_spec


def _read(config: Config) -> tuple[Architecture, dict[str, Any]]:
    heads = config.required("num_attention_heads")
    for key, only in {"hyena_filter_groups": 1, "mlp_activation": "silu", "final_norm": True, "smeared_gqa": False}.items():
        config.expect(key, only)
    config.expect("column_split_hyena", True)
    config.expect("short_filter_bias", True)
    config.expect("mha_out_proj_bias", config.get("qkv_proj_bias", True))
    stretched = config.get("use_interpolated_rotary_pos_emb", False)
    attention = layer_spec(
        "attention",
        {
            "heads": heads,
            "kv_heads": 0 if config.get("proj_groups", 1) == 1 else heads // config.required("proj_groups"),
            "bias": config.get("qkv_proj_bias", True),
            "rope_theta": float(config.get("rotary_emb_base", 1e4)),
            "rope_factor": float(config.get("rotary_emb_scaling_factor", 1.0)) if stretched else 1.0,
        },
    )
    width, order = config.required("short_filter_length"), config.required("state_size")
    hyena = layer_spec("hyena", {"expand": 1, "groups": 1, "width": width, "order": order, "modal": True})
    swiglu = layer_spec("swiglu", {"hidden": config.required("inner_mlp_size")})
    striped = set(config.get("attn_layer_idxs", ()))
    mixers = [attention if i in striped else hyena for i in range(config.required("num_layers"))]
    layers = tuple(layer for mixer in mixers for layer in (mixer, swiglu))
    tied = config.get("tie_embeddings", False)
    return Architecture(layers), {"tied": tied, "unembedding_bias": False, "norm_eps": config.required("eps")}


def _entries(model: HybridLM, names: Container[str], config: Config) -> list[Entry]:
    root = "backbone." if "backbone.norm.scale" in names else ""
    found = [same("embedding.weight", f"{root}embedding_layer.weight"), same("backbone.norm.weight", f"{root}norm.scale")]
    if not model.tied:
        found.append(same("unembedding.weight", f"{root}unembed.weight"))
    for i, layer in enumerate(model.backbone.layers):
        ours, theirs = f"backbone.layers.{i}", f"{root}blocks.{i // 2}"
        found.append(same(f"backbone.norms.{i}.weight", f"{theirs}.{('pre', 'post')[i % 2]}_norm.scale"))
        if isinstance(layer, Attention):
            found += _attention(layer, ours, f"{theirs}.inner_mha_cls")
        elif isinstance(layer, SwiGLU):
            halves = {f"{theirs}.mlp.{name}.weight": layer.hidden for name in ("l1", "l2")}
            found += [rows(f"{ours}.gate_up.weight", halves), same(f"{ours}.down.weight", f"{theirs}.mlp.l3.weight")]
        elif isinstance(layer, Hyena):
            found += _hyena(config.required("num_attention_heads"), ours, theirs)
    return found


def _attention(layer: Attention, ours: str, theirs: str) -> list[Entry]:
    pairs = [("qkv", "Wqkv"), ("out", "out_proj")]
    kinds = ("weight",) if layer.qkv.bias is None else ("weight", "bias")
    return [same(f"{ours}.{one}.{kind}", f"{theirs}.{other}.{kind}") for one, other in pairs for kind in kinds]


def _hyena(heads: int, ours: str, theirs: str) -> list[Entry]:
    def apart(tensors: Sequence[Tensor]) -> Tensor:
        """Rows of q, k and v, head by head, to all of q, all of k and all of v."""
        return tensors[0].reshape(heads, 3, -1, *tensors[0].shape[1:]).transpose(0, 1).flatten(0, 2)

    def taps(tensors: Sequence[Tensor]) -> Tensor:
        return apart(tensors).squeeze(1)

    def logarithms(tensors: Sequence[Tensor]) -> Tensor:
        (poles,) = tensors
        wide = torch.view_as_real(torch.view_as_complex(poles.squeeze(2).double()).log())
        return wide.to(torch.promote_types(poles.dtype, torch.float32))

    return [
        Entry(f"{ours}.in_proj.weight", (f"{theirs}.projections.weight",), apart),
        Entry(f"{ours}.in_proj.bias", (f"{theirs}.projections.bias",), apart),
        Entry(f"{ours}.conv_weight", (f"{theirs}.filter.short_filter_weight",), taps),
        Entry(f"{ours}.conv_bias", (f"{theirs}.filter.short_filter_bias",), apart),
        Entry(f"{ours}.filter.log_poles", (f"{theirs}.filter.poles",), logarithms),
        Entry(f"{ours}.filter.residues", (f"{theirs}.filter.residues",), lambda tensors: tensors[0].squeeze(2)),
        same(f"{ours}.skip", f"{theirs}.filter.D"),
        same(f"{ours}.out.weight", f"{theirs}.out_filter_dense.weight"),
        same(f"{ours}.out.bias", f"{theirs}.out_filter_dense.bias"),
    ]


STRIPED_HYENA = Family("stripedhyena", _read, _entries)
