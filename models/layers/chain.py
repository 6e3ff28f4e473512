"""States from chunk to chunk: ``S[0] = first``, ``S[n + 1] = A[n] S[n] + written[n]``.

One after the other, so that what is forgotten leaves no rounding behind, whatever the length; and as one operator, so that a
compiled or exported graph is as large for a long sequence as for a short one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from madkernels.ops.registration import register_gradient


def chain(transition: Tensor, written: Tensor, first: Tensor) -> Tensor:
    """All states, (batch, heads, chunks + 1, key_dim, value_dim).

    Args:
        transition: A, (batch, heads, chunks, key_dim, key_dim); or, where it only scales, (batch, heads, chunks, key_dim).
        written: (batch, heads, chunks, key_dim, value_dim).
        first: (batch, heads, key_dim, value_dim).

    Differentiable any number of times, in reverse and in forward mode; maps under torch.func.vmap.
    """
    states: Tensor = torch.ops.madkernels.chain(transition, written, first)
    return states


def _moved(transition: Tensor, n: int, state: Tensor) -> Tensor:
    """A[n] times a state."""
    matrix = transition[:, :, n]
    return matrix @ state if transition.dim() == 5 else matrix.unsqueeze(-1) * state


def _by_steps(transition: Tensor, written: Tensor, first: Tensor) -> Tensor:
    states = [first]
    for n in range(written.shape[2]):
        states.append(_moved(transition, n, states[-1]) + written[:, :, n])
    return torch.stack(states, 2)


def _chain(transition: Tensor, written: Tensor, first: Tensor) -> Tensor:
    states = _empty(transition, written, first)
    states[:, :, 0] = first
    for n in range(written.shape[2]):
        torch.add(_moved(transition, n, states[:, :, n]), written[:, :, n], out=states[:, :, n + 1])
    return states


def _empty(transition: Tensor, written: Tensor, first: Tensor) -> Tensor:
    batch, heads, chunks, *matrix = written.shape
    return written.new_empty(batch, heads, chunks + 1, *matrix)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _gradient(ctx: Any, dstates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoints of the states are a chain too, from the last state to the first."""
    transition, states = ctx.saved_tensors
    diagonal = transition.dim() == 4
    back = (transition if diagonal else transition.mT).flip(2)
    adjoint = chain(back, dstates[:, :, :-1].flip(2), dstates[:, :, -1]).flip(2)
    later, before = adjoint[:, :, 1:], states[:, :, :-1]
    return (later * before).sum(-1) if diagonal else later @ before.mT, later, adjoint[:, :, 0]


def _map(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
    """Each map is so many more rows of the batch."""
    size = info.batch_size
    rows = [
        (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]
    states = chain(*rows)
    return states.view(size, -1, *states.shape[1:]), 0


torch.library.define("madkernels::chain", "(Tensor transition, Tensor written, Tensor first) -> Tensor")
torch.library.impl("madkernels::chain", "CompositeExplicitAutograd")(_chain)
torch.library.register_fake("madkernels::chain")(_empty)
torch.library.register_vmap("madkernels::chain", _map)
register_gradient("madkernels::chain", _gradient, _save, _by_steps)
