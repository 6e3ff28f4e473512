"""Text after prompts: the first pass over them, then token by token from the states they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from madkernels.models.layers import Layer, State

if TYPE_CHECKING:
    from madkernels.models.lm import HybridLM

# The state of a layer: of a batch, or of each sequence where these cannot be one, as where lengths differ.
States = list[State | list[State]]


def prefill(model: HybridLM, prompts: Tensor | Sequence[Tensor]) -> tuple[Tensor, States]:
    """Prompts (prompts, seqlen), or (seqlen,) each of any lengths -> logits (prompts, vocab_size) after each, and the states
    of the layers."""
    if not isinstance(prompts, Tensor) and len({len(prompt) for prompt in prompts}) == 1:
        prompts = torch.stack(list(prompts))
    if isinstance(prompts, Tensor):
        states = model.init_state(len(prompts))
        return model(prompts, states=states)[:, -1], [*states]
    alone = [model.init_state(1) for _ in prompts]
    logits = [model(prompt.unsqueeze(0), states=states)[:, -1] for prompt, states in zip(prompts, alone, strict=True)]
    return torch.cat(logits), [joined(of_layer) for of_layer in zip(*alone, strict=True)]


def joined(states: Sequence[State]) -> State | list[State]:
    """States of one sequence each as that of a batch, where they are of one shape and what is not of a sequence is equal."""
    first = states[0]
    for name, value in first.items():
        for other in states[1:]:
            same = torch.equal(other[name], value) if value.dim() == 0 else other[name].shape == value.shape
            if not same:
                return list(states)
    return {name: value if value.dim() == 0 else torch.cat([s[name] for s in states]) for name, value in first.items()}


def step(layer: Layer, x: Tensor, state: State | list[State]) -> Tensor:
    """One token of each sequence, (batch, dim), through a layer."""
    if not isinstance(state, list):
        return layer.step(x, state)
    return torch.cat([layer.step(row.unsqueeze(0), own) for row, own in zip(x, state, strict=True)])


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
    """Token after token, (prompts,) each, that :meth:`HybridLM.generate` adds; prompts as of :func:`prefill`. The host does
    not wait for a device."""
    _check(prompts, most, temperature, top_k, top_p)
    logits, states = prefill(model, prompts)
    for left in reversed(range(most)):
        chosen = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
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
