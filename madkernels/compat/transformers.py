"""Attention and experts for models of Hugging Face transformers: ``attn_implementation="madkernels"``, and
``experts_implementation="madkernels"`` (transformers 5).

    from madkernels.compat import transformers
    transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="madkernels", experts_implementation="madkernels")

Attention: grouped heads, causal and sliding windows, softcap, sinks, padded batches, packed documents, and decoding over a
cache. What else a model masks, such as chunks or a prefix, goes through a mask as large as the scores.

Experts: those of Mixtral, Qwen, OLMoE, DeepSeek and others whose MLPs are plain or gated by SiLU, GELU or ReLU. Others, and
devices other than a CPU, get transformers' own grouped product.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from madkernels import attention, attention_step, moe_mlp, moe_route

NAME = "madkernels"
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "ReLU": "relu"}  # by their class
GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}


def register() -> None:
    """Makes ``attn_implementation="madkernels"`` known to transformers, 4.56 or newer, and, from 5 on,
    ``experts_implementation="madkernels"``."""
    import_module("transformers").AttentionInterface.register(NAME, forward)
    import_module("transformers.masking_utils").AttentionMaskInterface.register(NAME, make_mask)
    if int(import_module("transformers").__version__.partition(".")[0]) >= 5:
        _moe().ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def make_mask(
    *args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, local_size: int | None = None,
    **options: Any,
) -> Tensor | None:  # fmt: skip
    """What `forward` gets as a mask: nothing where causality and a window say it all, (batch, keys) where a batch is padded,
    else (batch, 1, queries, keys)."""
    in_chunks = local_size is not None and _in_chunks(options["mask_function"], local_size)
    if not allow_is_causal_skip or in_chunks or (attention_mask is None and _with_room(**options)):
        whole = import_module("transformers.masking_utils").sdpa_mask
        found: Tensor | None = whole(*args, attention_mask=attention_mask, allow_is_causal_skip=False, **options)
        return found
    if attention_mask is None:
        return None
    padding = attention_mask[:, -options["kv_length"] :]
    return None if padding.shape[1] == options["kv_length"] and bool(padding.all()) else padding


def _with_room(q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int, **further: Any) -> bool:
    """Whether a cache is one of fixed size, of which the keys after the last query are still empty."""
    return isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length


def _in_chunks(mask_function: Any, size: int) -> bool:
    """Whether a local mask is one of chunks, not of a window: then a query sees nothing before its chunk."""
    at = [torch.tensor(i) for i in (0, 0, size, size - 1)]  # of sequence, head, query and key
    return size > 1 and not bool(mask_function(*at))


def forward(
    module: torch.nn.Module,
    query: Tensor,  # (batch, heads, queries, head_dim)
    key: Tensor,  # (batch, kv_heads, keys, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """The interface of transformers: -> (batch, queries, heads, head_dim), and no weights."""
    if dropout:
        raise ValueError(f"attn_implementation={NAME!r} has no dropout: set attention_dropout to 0; it is {dropout}")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0, "bias": position_bias}
    options |= {"sink": None if s_aux is None else s_aux.float()}
    if attention_mask is not None and attention_mask.dim() == 4:
        options["bias"] = _added(attention_mask, position_bias, q.dtype)
        return attention(q, k, v, **options), None
    options |= {"causal": causal and q.shape[1] > 1, "window": sliding_window}
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, options), None
    if q.shape[1] == 1 and q.device.type == "cpu" and position_bias is None and not torch.is_grad_enabled():
        return _one_token(q, k, v, options), None
    options |= {"cu_seqlens_q": further.get("cu_seq_lens_q"), "cu_seqlens_k": further.get("cu_seq_lens_k")}
    return attention(q, k, v, **options), None


def _added(mask: Tensor, position_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A mask, of truth values or added to scores, as a bias."""
    if mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.to(dtype) if position_bias is None else (mask + position_bias).to(dtype)


def _padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Rows of unequal lengths, packed one after another; what stands for padding comes back as 0."""
    if options["bias"] is not None:
        raise ValueError(f"attn_implementation={NAME!r} takes no position bias beside padding")
    keys = mask.bool()
    k, v = k[:, : keys.shape[1]], v[:, : keys.shape[1]]  # a cache may be longer than what is in it
    queries = keys[:, -q.shape[1] :]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    options |= {"cu_seqlens_q": _offsets(queries), "cu_seqlens_k": _offsets(keys)}
    out[queries] = attention(q[queries][None], k[keys][None], v[keys][None], **options)[0]
    return out


def _offsets(kept: Tensor) -> Tensor:
    """Where each row's kept positions begin once they are packed, and where the last row's end."""
    return torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()


def _one_token(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The last position of each sequence, over a cache that has it."""
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    kept = {name: options[name] for name in ("softmax_scale", "softcap", "sink", "window")}
    out: Tensor = attention_step(q[:, 0], k, v, cache_seqlens=lengths, **kept)
    return out.unsqueeze(1)


def experts_forward(module: torch.nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The interface of transformers: x (tokens, dim), experts and weights (tokens, top_k) -> (tokens, dim)."""
    experts: Any = module
    activation = _activation_of(experts)
    if activation is None or x.device.type != "cpu":
        own: Tensor = _moe().grouped_mm_experts_forward(module, x, chosen, weights)
        return own
    first, second = (experts.gate_up_proj if experts.has_gate else experts.up_proj), experts.down_proj
    if experts.is_transposed:
        first, second = first.mT, second.mT
    biases: dict[str, Tensor] = {}
    if experts.has_bias:
        biases["gate_up_bias"] = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        biases["down_bias"] = experts.down_proj_bias
    plan = _plan_of(chosen, weights, second.shape[0])
    return moe_mlp(x, plan, first, second, activation=activation, **biases)


def _moe() -> Any:
    return import_module("transformers.integrations.moe")


def _activation_of(experts: Any) -> str | None:
    """None where the experts are not of a kind that the op has."""
    function: Any = getattr(experts, "act_fn", None)
    name = ACTIVATIONS.get(type(function).__name__)
    if name == "gelu" and function.act is not torch.nn.functional.gelu:  # an approximation
        return None
    if getattr(experts, "_is_expert_parallel", False) or getattr(experts, "has_post_expert_norm", False):
        return None
    if name is None or not experts.has_gate:
        return name
    plain = type(experts)._apply_gate is _moe()._default_apply_gate and getattr(experts, "is_concatenated", True)
    return GATED[name] if plain else None


def _plan_of(chosen: Tensor, weights: Tensor, experts: int) -> Any:
    """A plan of what a model's own router chose: as if it had been by scores that fall along its choices."""
    falling = torch.arange(chosen.shape[1], 0, -1, device=chosen.device, dtype=torch.float32).expand(chosen.shape)
    scores = falling.new_full((chosen.shape[0], experts), -torch.inf).scatter(1, chosen, falling)
    wide = torch.promote_types(weights.dtype, torch.float32)
    return moe_route(scores, chosen.shape[1])._replace(weights=weights.to(wide))
