"""Text after prompts: one pass over all of them, packed where their lengths differ, then one batch, token by token, from the
states that they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from madkernels.models.layers import State

if TYPE_CHECKING:
    from madkernels.models.lm import HybridLM


def prefill(model: HybridLM, prompts: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[State]]:
    """One pass over all prompts; what it takes of memory grows with their tokens together. The unembedding sees the last
    token of each alone.

    Args:
        model: with prompts of unequal lengths, one whose layers all say `packs_states`.
        prompts: (prompts, seqlen), or (seqlen,) each of any lengths from 1.

    Returns:
        Logits (prompts, vocab_size) after each, and the states of the layers, of a batch of so many sequences.
    """
    if not isinstance(prompts, Tensor) and len(set(map(len, prompts))) == 1:
        prompts = torch.stack(list(prompts))
    states = model.init_state(len(prompts))
    if isinstance(prompts, Tensor):
        last = model.backbone(model.embedding(prompts), states=states)[:, -1]
    else:
        packed = torch.cat(list(prompts))
        offsets = torch.tensor([0, *accumulate(map(len, prompts))], dtype=torch.int32, device=packed.device)
        last = model.backbone(model.embedding(packed[None]), cu_seqlens=offsets, states=states)[0, offsets[1:] - 1]
    return model.unembedding(last), states


def choose(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """A token of each row of logits (batch, vocab_size): the likeliest at temperature 0, else drawn from what is left of the
    distribution by `top_k`, then by `top_p` (Holtzman et al. 2020, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
    scores, tokens = scores.sort(dim=-1, descending=True)
    if top_k is not None:
        scores, tokens = scores[:, :top_k], tokens[:, :top_k]
    shares = scores.softmax(-1)
    if top_p is not None:
        before = shares.cumsum(-1) - shares
        shares = shares.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(shares, 1, generator=generator)
    return tokens.gather(1, drawn).squeeze(1)


@torch.no_grad()
def new_tokens(
    model: HybridLM,
    prompts: Tensor | Sequence[Tensor],
    most: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Token after token, (prompts,) each, that :meth:`HybridLM.generate` adds; prompts as of :func:`prefill`. From token to
    token the host does not wait for a device. With a layer that does not say `packs_states`, prompts of unequal lengths are
    not a batch: each goes through the model alone."""
    _check(prompts, most, temperature, top_k, top_p)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    if len(set(map(len, prompts))) > 1 and not all(layer.packs_states for layer in model.backbone.layers):
        alone = [new_tokens(model, prompt[None], most, **options) for prompt in prompts]
        for each in zip(*alone, strict=True):
            yield torch.cat(each)
        return
    logits, states = prefill(model, prompts)
    for left in reversed(range(most)):
        chosen = choose(logits, **options)
        yield chosen
        if left:
            logits = model.step(chosen, states)


def continue_prompts(
    model: HybridLM,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    end: int | None = None,
    on_tokens: Callable[[list[int]], object] | None = None,
    **options: Any,
) -> list[list[int]]:
    """What :meth:`HybridLM.generate` says, of prompts (seqlen >= 1,) of any lengths; the new tokens of each.

    Args:
        end: a sequence ends before this token.
        on_tokens: called with the new token of each sequence, -1 behind its end; where it gives True, no more are made.
        options: of drawing, as of :meth:`HybridLM.generate`.
    """
    found: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for chosen in new_tokens(model, prompts, max_new_tokens, **options):
        tokens: list[int] = chosen.tolist()
        going = [goes and token != end for goes, token in zip(going, tokens, strict=True)]
        if not any(going):
            break
        told = [token if goes else -1 for token, goes in zip(tokens, going, strict=True)]
        for new, token in zip(found, told, strict=True):
            if token >= 0:
                new.append(token)
        if on_tokens and on_tokens(told) is True:
            break
    return found


def _check(
    prompts: Tensor | Sequence[Tensor], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    lengths = [prompts.shape[1]] if isinstance(prompts, Tensor) else list(map(len, prompts))
    if min(lengths, default=0) == 0:
        raise ValueError("generate needs a prompt of one token at least")
    if max_new_tokens < 0 or not temperature >= 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and temperature {temperature}; expected both from 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected a whole number from 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a share above 0 and up to 1")
