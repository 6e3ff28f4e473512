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
    """Memory for more tokens than there are, (batch, capacity, heads, head_dim). `filled`: tokens written so far."""

    memory: Tensor
    filled: int


# The room that a state lies in, and where in it the state ends. A state that came otherwise (a copy, a view, one from disk)
# has none, and gets its own.
_rooms: MutableMapping[Tensor, tuple[Room, int]] = WeakTensorKeyDictionary()


def append(past: Tensor, new: Tensor, window: int | None) -> Tensor:
    """`past` (batch, seqlen, heads, head_dim) with one token more, (batch, heads, head_dim), as far as the window reaches.

    The token goes into the memory behind `past`, if that is free: of several continuations of a state the first one's goes
    there, and the others take room of their own. So no state is ever written over.
    """
    room, end = _rooms[past] if past in _rooms else _room_for(past)
    if room.filled != end or end == room.memory.shape[1]:
        room, end = _room_for(past)
    room.memory[:, end] = new
    room.filled = end + 1
    begin = end - past.shape[1] if window is None else max(end - past.shape[1], end + 1 - window)
    longer = room.memory[:, begin : end + 1]
    _rooms[longer] = (room, end + 1)
    return longer


def _room_for(past: Tensor) -> tuple[Room, int]:
    """A copy with as much room again, so that a token is copied once more on average; and where it ends."""
    batch, seqlen, *rest = past.shape
    memory = past.new_empty(batch, 2 * max(seqlen, LEAST_ROOM), *rest)
    memory[:, :seqlen] = past
    return Room(memory, seqlen), seqlen


def can_append(*values: Tensor) -> bool:
    """Whether nobody looks on who would miss what is done in place: no derivative, no trace and no mapped axis."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not (watched or torch._C._are_functorch_transforms_active() or has_tangent(values))
