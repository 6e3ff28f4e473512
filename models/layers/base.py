"""What every layer offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

# What a layer remembers of a sequence between calls, by name. `forward` and `step` replace its tensors.
State = dict[str, Tensor]

Mixes = Literal["sequence", "channel", "both"]
FAR = 2**40  # tokens: longer than any window


def in_proportion(value: int, state: int, wanted: int) -> float:
    return value * wanted / state


def inversely(value: int, state: int, wanted: int) -> float:
    return value * state / wanted


@dataclass(frozen=True)
class StateOption:
    """The option that sets a layer's state.

    Attributes:
        name: of the option, a whole number.
        solve: from a value, the state there and a wanted state, the value that has it; whole numbers next to it are tried.
    """

    name: str
    solve: Callable[[int, int, int], float] = in_proportion


class Layer(nn.Module):
    """One residual branch of a model: (batch, seqlen, dim) to (batch, seqlen, dim), causal along the sequence.

    A layer is built as ``Cls(dim, **options)``; its options are the keyword-only arguments of its class, with defaults.
    """

    mixes: ClassVar[Mixes] = "sequence"
    is_attention: ClassVar[bool] = False  # softmax attention: what a share of attention counts
    state_grows: ClassVar[bool] = False  # with the sequence, without bound
    state_option: ClassVar[StateOption | None] = None  # sets the fixed state
    hidden_option: ClassVar[str | None] = None  # the hidden width, which sets the parameters
    packs_states: ClassVar[bool] = False  # `forward` fills a fresh state with those of packed documents

    # Parameters of two or more dimensions that weight decay leaves alone; those of one it always does.
    undecayed: ClassVar[tuple[str, ...]] = ()

    dim: int

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.dim = dim

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        """The whole sequence.

        Args:
            x: (batch, seqlen, dim).
            cu_seqlens: offsets of packed documents, (num_docs + 1,) int32; batch must be 1. Nothing passes between them.
            state: continues the sequences that left it, and is brought up to date. Together with `cu_seqlens`, where the
                class says `packs_states`, a fresh one, ``init_state(num_docs)``: it becomes that of a batch of sequences,
                each at the end of its document. Where a state grows, that of a short document has room that is not used.

        Raises:
            ValueError: an argument that no layer takes, named in the message.
        """
        raise NotImplementedError

    def check(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> None:
        """Raises ValueError for what no `forward` takes."""
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, seqlen, {self.dim})")
        if cu_seqlens is None:
            return
        check_documents(cu_seqlens, x)
        if state is not None:
            if not self.packs_states:
                raise ValueError(f"{type(self).__name__} takes cu_seqlens or state, not both: it does not say packs_states")
            check_fresh(state, cu_seqlens)

    def step(self, x: Tensor, state: State) -> Tensor:
        """One token: x (batch, dim) to (batch, dim); brings `state` up to date."""
        return self.forward(x.unsqueeze(1), state=state).squeeze(1)

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        return {}

    def state_size(self, seqlen: int) -> int:
        """Elements that the layer keeps for one sequence of this length. Taps of short convolutions are not counted."""
        return 0

    def fixed_state(self) -> int:
        """Elements that are kept for a sequence however long: all that a window holds, nothing where the state grows.

        Raises:
            ValueError: the state grows, and the layer's class does not say so.
        """
        if self.state_grows:
            return 0
        size = self.state_size(FAR)
        if self.state_size(2 * FAR) != size:
            raise ValueError(
                f"the state of {type(self).__name__} grows with the sequence: its class needs state_grows = True"
            )
        return size

    def flops(self, seqlen: int) -> int:
        """FLOPs of `forward` for one sequence, a multiply-add being two. What causality spares is not taken off."""
        raise NotImplementedError

    def active_params(self) -> int:
        """Parameters that one token uses."""
        return sum(p.numel() for p in self.parameters())

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros on the device of the parameters, in their dtype unless told otherwise."""
        like = next(self.parameters())
        return torch.zeros(shape, device=like.device, dtype=dtype or like.dtype)


def check_positive(**sizes: int) -> None:
    """Raises ValueError unless all are integers from 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} is {size!r}; expected a whole number from 1")


def check_documents(cu_seqlens: Tensor, x: Tensor) -> None:
    """Raises ValueError unless `cu_seqlens` packs documents along x (1, seqlen, dim)."""
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents along one row; expected batch 1, got {x.shape[0]}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has dtype {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)}; expected int32 (num_docs + 1,)"
        )
    # The values are looked at where that costs nothing: not on a GPU, where the host would wait, nor in a graph.
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != x.shape[1] or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}; expected offsets rising from 0 to the seqlen, {x.shape[1]}")


def check_fresh(state: State, cu_seqlens: Tensor) -> None:
    """Raises ValueError unless the state is one before the first token of so many documents."""
    documents = cu_seqlens.shape[0] - 1
    for name, value in state.items():
        if value.shape[0] != documents:
            raise ValueError(
                f"state {name} is of {value.shape[0]} sequences; expected init_state({documents}), of the documents"
            )
        if can_look(value) and value.any():
            raise ValueError(
                f"state {name} has seen tokens; with cu_seqlens a fresh one is expected, init_state({documents})"
            )


def can_look(t: Tensor) -> bool:
    """Whether values can be read, and nobody waits for them: not on a GPU, in a graph, or under a mapped axis."""
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return t.device.type == "cpu" and not (watched or torch._C._are_functorch_transforms_active())


def document_of(cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """The number of the document that each position lies in, (seqlen,) int64."""
    positions = torch.arange(seqlen, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). The gradient of torch's own has, in a compiled graph, another layout than the graph was made for."""
    return torch.logaddexp(x, x.new_zeros(()))


def no_narrower(after: Tensor, before: Tensor) -> Tensor:
    """A state as it replaces another: under autocast, too, it keeps the other's precision."""
    return after.to(torch.promote_types(after.dtype, before.dtype))


def cast_once(x: Tensor) -> Tensor:
    """Under autocast x in its dtype: one copy for all that take it, where each would make and keep one."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def wide(x: Tensor) -> Tensor:
    """x in float32 at least, for decay rates, which are exponentiated and summed over the sequence."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
