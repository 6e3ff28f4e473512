"""Linear recurrences over matrix states, in chunks of matrix products: what linear attention, GLA, RWKV, Mamba-2 and the
delta rule have in common (Yang et al. 2023, arXiv 2312.06635; Dao and Gu 2024, arXiv 2405.21060; Yang et al. 2024, arXiv
2412.06464).

Within a chunk every step reads every earlier one under the decay between them; across chunks only the states at their
borders are passed on, one after the other. The decay between two steps is the exponential of the sum of what lies between
them, never a ratio, so that none overflows, and what was forgotten before leaves no rounding behind. Arithmetic is in
float32 at least, under autocast too. Documents of a packed row are told by their numbers: what would pass between two of
them is masked. The state at a document's end is made from its last chunk: what enters it, and what is written until there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels.models.layers.chain import chain

MOST_DECAY = 1000.0  # of a step, as a logarithm: nothing is left, in float64 neither
SCALAR_CHUNK = 64  # decays that are one number per head: scores are matrix products
VECTOR_CHUNK = 16  # decays of each key channel: scores are summed channel by channel


def without_autocast(recurrence: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Products of states stay in the dtype that they are given in."""

    @wraps(recurrence)
    def call(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if not torch.amp.is_autocast_available(q.device.type):  # of tensors without memory
            return recurrence(q, *args, **options)
        with torch.autocast(q.device.type, enabled=False):
            return recurrence(q, *args, **options)

    return call


@without_autocast
def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    document: Tensor | None = None,
    ends: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S[t] = exp(log_decay[t]) S[t-1] + k[t] v[t]'`` and ``y[t] = q[t]' S[t]``; with a bonus, as in RWKV,
    ``y[t] = q[t]' (S[t-1] + bonus k[t] v[t]')``.

    Args:
        q, k: (batch, seqlen, heads, key_dim); one head serves all where v has more.
        v: (batch, seqlen, heads, value_dim).
        log_decay: at most 0; (batch, seqlen, heads, key_dim), or 1 for key_dim where a head decays as one. At -inf what came
            before is forgotten.
        state: before the first step, (batch, heads, key_dim, value_dim); zeros if absent.
        document: number of each step's document, (seqlen,); nothing passes between two of them.
        ends: where the documents end, (num_docs,), as many as cu_seqlens has: asks for the state of each. Batch 1, and no
            state before the first step.
        bonus: (heads, key_dim).

    Returns:
        y (batch, seqlen, heads, value_dim) in v's dtype, and the state after the last step, or with `ends` after each
        document, (num_docs, heads, key_dim, value_dim), zeros if it is empty; in float32 at least.
    """
    if torch.compiler.is_exporting():
        results: tuple[Tensor, Tensor] = _exported_linear_recurrence(q, k, v, log_decay, state, document, ends, bonus)
        return results
    if q.shape[1] == 0:
        return v, _first(state, q, k, v, ends)
    chunk = SCALAR_CHUNK if log_decay.shape[-1] == 1 else VECTOR_CHUNK
    c = _Chunks(q.shape[1], chunk, document, q.device)
    queries, keys, values, steps = (c.cut(t) for t in (q, k, v, log_decay))  # (batch, heads, chunks, steps, ...)
    decays = _Decays(steps, before_its_step=bonus is not None)
    scores = _scores(queries, keys, decays.between(c.step_sees_step(diagonal=0 if bonus is None else -1)))
    if bonus is not None:
        scores = scores + torch.diag_embed((queries * keys * bonus.to(queries.dtype)[:, None, None]).sum(-1))
    gathered = (keys * decays.to_the_end() * c.step_reaches_end).mT @ values  # (batch, heads, chunks, key_dim, value_dim)
    transition = (decays.over_all() * c.state_passes_through[:, None]).expand(gathered.shape[:-1])
    states = chain(transition, gathered, _first(state, q, k, v))
    y = scores @ values + (queries * decays.since_the_start() * c.state_reaches_step) @ states[:, :, :-1]
    after = states[:, :, -1] if ends is None else _at_ends(ends, c, decays, states, keys, values)
    return c.join(y).to(v.dtype), after


@without_autocast
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    document: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S[t] = a (I - beta[t] k[t] k[t]') S[t-1] + beta[t] k[t] v[t]'`` with ``a = exp(log_decay[t])``;
    ``y[t] = q[t]' S[t]``.

    The state's error at k[t], rather than v[t] itself, is what a step writes: ``u[t] = beta[t] (v[t] - a k[t]' S[t-1])``.
    Within a chunk all u solve one triangular system (the WY form); chunks follow one another.

    Args:
        q, k: (batch, seqlen, heads, key_dim); keys of norm at most 1 with beta up to 2 keep it stable.
        v: (batch, seqlen, heads, value_dim).
        beta, log_decay: (batch, seqlen, heads, 1).
        state, document, ends: as of :func:`linear_recurrence`.

    Returns:
        As of :func:`linear_recurrence`.
    """
    if torch.compiler.is_exporting():
        results: tuple[Tensor, Tensor] = _exported_delta_rule(q, k, v, beta, log_decay, state, document, ends)
        return results
    if q.shape[1] == 0:
        return v, _first(state, q, k, v, ends)
    c = _Chunks(q.shape[1], SCALAR_CHUNK, document, q.device)
    queries, keys, values, rates, steps = (c.cut(t) for t in (q, k, v, beta, log_decay))
    decays = _Decays(steps)
    decay, since_start = decays.between(c.step_sees_step(diagonal=0)), decays.since_the_start() * c.state_reaches_step
    earlier = (rates * _scores(keys, keys, decay)).tril(-1)
    written = torch.cat([values, keys * since_start], -1) * rates
    written = torch.linalg.solve_triangular(earlier, written, upper=False, unitriangular=True)
    fresh, forgotten = written.split([v.shape[-1], k.shape[-1]], -1)  # u = fresh - forgotten S, with S at the chunk's start
    gathering = (keys * decays.to_the_end() * c.step_reaches_end).mT
    passing = (decays.over_all() * c.state_passes_through[:, None]).unsqueeze(-1) * torch.eye(k.shape[-1], device=k.device)
    states = chain(passing - gathering @ forgotten, gathering @ fresh, _first(state, q, k, v))
    entering = states[:, :, :-1]
    u = fresh - forgotten @ entering
    y = _scores(queries, keys, decay) @ u + (queries * since_start) @ entering
    after = states[:, :, -1] if ends is None else _at_ends(ends, c, decays, states, keys, u)
    return c.join(y).to(v.dtype), after


def _first(state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None = None) -> Tensor:
    """The state before the first step, in float32 at least; with `ends`, of each document."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if state is not None:
        return state.to(dtype)
    sequences = v.shape[0] if ends is None else ends.shape[0]
    return v.new_zeros(sequences, v.shape[2], k.shape[-1], v.shape[-1], dtype=dtype)


def _at_ends(ends: Tensor, c: _Chunks, decays: _Decays, states: Tensor, keys: Tensor, written: Tensor) -> Tensor:
    """The state at each document's end, (num_docs, heads, key_dim, value_dim): what it keeps of the state that enters its
    last chunk, and of what its steps write there."""
    chunk, step, own, entered = c.at_ends(ends)
    after = decays.after[0][:, chunk]  # (heads, num_docs, steps, key_dim or 1)
    last = decays.after[0][:, chunk, step].unsqueeze(2)
    kept = decays.left(last).mT * entered[:, None, None]
    since = (last - after).masked_fill(~own[..., None], -torch.inf)
    gathered = (keys[0][:, chunk] * decays.left(since)).mT @ written[0][:, chunk]
    return (kept * states[0][:, chunk] + gathered).transpose(0, 1)


class _Decays:
    """What is left of a state within each chunk, from the log decays of its steps (batch, heads, chunks, steps, key_dim or
    1).

    Running sums are in float64, where a difference of two keeps the digits of what is between them.

    Args:
        before_its_step: whether a query sees the state before its own step, or after it.
    """

    def __init__(self, steps: Tensor, *, before_its_step: bool = False) -> None:
        self.steps, self.before_its_step = steps.clamp_min(-MOST_DECAY), before_its_step
        self.after = self.steps.double().cumsum(-2)
        self.read = F.pad(self.after[..., :-1, :], (0, 0, 1, 0)) if before_its_step else self.after

    def since_the_start(self) -> Tensor:
        """What is left of the state that enters the chunk, at each query."""
        return self.left(self.read)

    def to_the_end(self) -> Tensor:
        """What is left at the end of the chunk of what each step writes."""
        return self.left(self.after[..., -1:, :] - self.after)

    def over_all(self) -> Tensor:
        """What is left of the state that enters the chunk, at its end: (batch, heads, chunks, key_dim or 1)."""
        return self.left(self.after[..., -1, :])

    def between(self, step_sees_step: Tensor) -> Tensor:
        """What is left at query t of what was written at s: (batch, heads, chunks, t, s, key_dim or 1)."""
        scalar = self.steps.shape[-1] == 1
        sums = (self.read.unsqueeze(-2) - self.after.unsqueeze(-3)).to(self.steps.dtype) if scalar else self._added_up()
        return sums.masked_fill(~step_sees_step[..., None], -torch.inf).exp()

    def _added_up(self) -> Tensor:
        """The sums between pairs of steps as a product: of many channels that is faster than differences in float64, and
        exact too, since all that is added has one sign."""
        t = torch.arange(self.steps.shape[-2], device=self.steps.device)
        until = t[:, None] > t if self.before_its_step else t[:, None] >= t
        added = until[:, None, :] & (t > t[:, None])  # (t, s, step)
        sums = added.flatten(0, 1).to(self.steps.dtype) @ self.steps
        return sums.view(*sums.shape[:-2], len(t), len(t), sums.shape[-1])

    def left(self, sums: Tensor) -> Tensor:
        """What is left under a sum of log decays."""
        return sums.to(self.steps.dtype).exp()


def _scores(queries: Tensor, keys: Tensor, decay: Tensor) -> Tensor:
    """(batch, heads, chunks, t, s): q[t] k[s] under the decay from s to t."""
    if decay.shape[-1] == 1:
        return queries @ keys.mT * decay.squeeze(-1)
    return (queries.unsqueeze(-2) * keys.unsqueeze(-3) * decay).sum(-1)


def _steps_of_a_chunk(seqlen: int, most: int) -> int:
    """No more than there are; a graph that serves several lengths has whole chunks."""
    if seqlen == 1:
        return 1
    return most if torch.compiler.is_compiling() else min(most, seqlen)


class _Chunks:
    """How a sequence is cut into chunks, and masks of what documents let pass. For 8 steps, 2 documents, chunks of 4:

    ```text
    document                0 0 0 0 | 0 1 1 1
    state_reaches_step      1 1 1 1 | 1 0 0 0    (chunks, steps, 1): the step sees the state that enters its chunk
    step_reaches_end        1 1 1 1 | 0 1 1 1    (chunks, steps, 1): the state that leaves its chunk has what it writes
    state_passes_through       1    |    0       (chunks,): the state that enters the chunk is in the one that leaves it
    step_sees_step(t, s)                         s is not after t, and of one document: in chunk 2 no t > 0 sees s = 0
    ```

    Without documents all are true.
    """

    def __init__(self, seqlen: int, chunk: int, document: Tensor | None, device: torch.device) -> None:
        self.seqlen, self.chunk = seqlen, _steps_of_a_chunk(seqlen, chunk)
        self.chunks = (seqlen + self.chunk - 1) // self.chunk
        self.pad = self.chunks * self.chunk - seqlen
        self.document = None
        ones = torch.ones(self.chunks, device=device, dtype=torch.bool)
        self.state_passes_through = ones
        all_steps = torch.ones(1, 1, device=device, dtype=torch.bool)  # stands for (chunks, steps, 1)
        self.state_reaches_step = self.step_reaches_end = all_steps
        if document is not None:
            # The steps that fill up the last chunk belong to the last document.
            self.document = torch.cat([document, document[-1:].expand(self.pad)]).view(self.chunks, self.chunk)
            last = self.document[:, -1]
            before = torch.cat([self.document.flatten()[:1], last])  # the document that a border lies in
            self.state_reaches_step = (self.document == before[:-1, None]).unsqueeze(-1)
            self.step_reaches_end = (self.document == last[:, None]).unsqueeze(-1)
            self.state_passes_through = before[:-1] == last
            self.entering = before[:-1]

    def cut(self, t: Tensor) -> Tensor:
        """(batch, seqlen, heads, dim) to (batch, heads, chunks, steps, dim), in float32 at least, filled up with zeros."""
        t = t.to(torch.promote_types(t.dtype, torch.float32)).transpose(1, 2)
        return F.pad(t, (0, 0, 0, self.pad)).reshape(*t.shape[:2], self.chunks, self.chunk, t.shape[3])

    def join(self, t: Tensor) -> Tensor:
        """(batch, heads, chunks, steps, dim) to (batch, seqlen, heads, dim)."""
        return t.flatten(2, 3)[:, :, : self.seqlen].transpose(1, 2)

    def at_ends(self, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each document: its last chunk and step there, (num_docs,) each; which steps of that chunk it has, (num_docs,
        steps), with those that fill up and write nothing; and whether it entered that chunk, (num_docs,). An empty one has
        and enters none."""
        assert self.document is not None
        last = (ends.long() - 1).clamp_min(0)
        chunk, step = last // self.chunk, last % self.chunk
        number = torch.arange(len(ends), device=ends.device)
        return chunk, step, self.document[chunk] == number[:, None], self.entering[chunk] == number

    def step_sees_step(self, diagonal: int) -> Tensor:
        """Whether step t of a chunk sees its step s: (chunks or 1, t, s). diagonal: 0 if a step sees itself, else -1."""
        before = torch.ones(self.chunk, self.chunk, device=self.step_reaches_end.device, dtype=torch.bool).tril(diagonal)
        return before if self.document is None else before & (self.document.unsqueeze(-1) == self.document.unsqueeze(-2))


# ---- in exported graphs ----
#
# There a recurrence is one operator: how many chunks a length has, torch cannot follow for all lengths at once. It has no
# gradient: what is exported is there to be run.


@torch.library.custom_op("madkernels::linear_recurrence", mutates_args=())
def _exported_linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    document: Tensor | None,
    ends: Tensor | None,
    bonus: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _fresh(linear_recurrence(q, k, v, log_decay, state, document=document, ends=ends, bonus=bonus))


@torch.library.custom_op("madkernels::delta_rule", mutates_args=())
def _exported_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None, document: Tensor | None,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fresh(delta_rule(q, k, v, beta, log_decay, state, document=document, ends=ends))


def _fresh(results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What an operator may return: no view of its arguments."""
    y, state = results
    return y.clone(memory_format=torch.contiguous_format), state.clone(memory_format=torch.contiguous_format)


@_exported_linear_recurrence.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Any, document: Any, ends: Tensor | None, bonus: Any
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _first(None, q, k, v, ends)


@_exported_delta_rule.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Any, document: Any, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _first(None, q, k, v, ends)
