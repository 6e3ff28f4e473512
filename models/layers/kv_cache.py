"""Keys and values of decoding, that grow without a copy at each token."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from madkernels.tangents import has_tangent

LEAST_ROOM = 64  # tokens


@dataclass
class Room:
    """Memory for more tokens than there are, (batch, capacity, heads, head_dim), newest first. `free`: slots before them."""

    memory: Tensor
    free: int


# The room that a state lies in, and where in it the state begins. A state that came otherwise (a copy, a view, one from
# disk) has none, and gets its own.
_rooms: MutableMapping[Tensor, tuple[Room, int]] = WeakTensorKeyDictionary()


def append(past: Tensor, new: Tensor, window: int | None) -> Tensor:
    """`past` (batch, seqlen, heads, head_dim), newest first, with one token more, (batch, heads, head_dim), as far as the
    window reaches. Sequences may have fewer tokens than there are slots: what they have stays in front.

    The token goes into the memory before `past`, if that is free: of several continuations of a state the first one's goes
    there, and the others take room of their own. So no state is ever written over.
    """
    room, begin = _rooms[past] if past in _rooms else _room_for(past)
    if room.free != begin or begin == 0:
        room, begin = _room_for(past)
    begin -= 1
    room.memory[:, begin] = new
    room.free = begin
    seqlen = past.shape[1] + 1 if window is None else min(past.shape[1] + 1, window)
    longer = room.memory[:, begin : begin + seqlen]
    _rooms[longer] = (room, begin)
    return longer


def _room_for(past: Tensor) -> tuple[Room, int]:
    """A copy with as much room again, so that a token is copied once more on average; and where it begins."""
    batch, seqlen, *rest = past.shape
    free = max(seqlen, 2 * LEAST_ROOM - seqlen)
    memory = past.new_empty(batch, free + seqlen, *rest)
    memory[:, free:] = past
    return Room(memory, free), free


def can_append(*values: Tensor) -> bool:
    """Whether nobody looks on who would miss what is done in place: no derivative, no trace and no mapped axis."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not (watched or torch._C._are_functorch_transforms_active() or has_tangent(values))
