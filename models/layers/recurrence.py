"""Linear recurrences over matrix states, in chunks of matrix products: what linear attention, GLA, RWKV, Mamba-2 and the
delta rule have in common (Yang et al. 2023, arXiv 2312.06635; Dao and Gu 2024, arXiv 2405.21060; Yang et al. 2024, arXiv
2412.06464).

Within a chunk every step reads every earlier one under the decay between them; across chunks only the states at their
borders are passed on. Decays are differences of running sums of logarithms, never ratios, so that none overflows.
Arithmetic is in float32 at least. Documents of a packed row are told by their numbers: what would pass between two of them
is masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALAR_CHUNK = 64  # decays that are one number a head: scores are matrix products
VECTOR_CHUNK = 16  # decays of each key channel: scores are summed channel by channel


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    document: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S[t] = exp(log_decay[t]) S[t-1] + k[t] v[t]'`` and ``y[t] = q[t]' S[t]``; with a bonus, as in RWKV,
    ``y[t] = q[t]' (S[t-1] + bonus k[t] v[t]')``.

    Args:
        q, k: (batch, seqlen, heads, key_dim); one head serves all where v has more.
        v: (batch, seqlen, heads, value_dim).
        log_decay: at most 0; (batch, seqlen, heads, key_dim), or 1 for key_dim where a head decays as one.
        state: before the first step, (batch, heads, key_dim, value_dim); zeros if absent.
        document: number of each step's document, (seqlen,); nothing passes between two of them.
        bonus: (heads, key_dim).

    Returns:
        y (batch, seqlen, heads, value_dim) in v's dtype, and the state after the last step, in float32 at least.
    """
    chunk = SCALAR_CHUNK if log_decay.shape[-1] == 1 else VECTOR_CHUNK
    c = _Chunks(q.shape[1], chunk, document, q.device)
    queries, keys, values, steps = (c.cut(t) for t in (q, k, v, log_decay))  # (batch, heads, chunks, steps, ...)
    after = steps.cumsum(-2)  # from the chunk's start to after each step
    total = after[..., -1:, :]
    read = after if bonus is None else after - steps  # a query with a bonus sees the state before its step
    scores = _scores(queries, keys, _decay(read, after, c.visible(diagonal=0 if bonus is None else -1)))
    if bonus is not None:
        scores = scores + torch.diag_embed((queries * keys * bonus.to(queries.dtype)[:, None, None]).sum(-1))
    gathered = (keys * (total - after).exp() * c.kept).mT @ values  # (batch, heads, chunks, key_dim, value_dim)
    states = _at_borders(gathered, total.squeeze(-2), c, state)
    y = scores @ values + (queries * read.exp() * c.reached) @ states[:, :, :-1]
    return c.join(y).to(v.dtype), states[:, :, -1]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    document: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S[t] = a (I - beta[t] k[t] k[t]') S[t-1] + beta[t] k[t] v[t]'`` with ``a = exp(log_decay[t])``;
    ``y[t] = q[t]' S[t]``.

    The state's error at k[t], rather than v[t] itself, is what a step writes: ``u[t] = beta[t] (v[t] - a k[t]' S[t-1])``.
    Within a chunk all u solve one triangular system (the WY form); chunks follow one another.

    Args:
        q, k: (batch, seqlen, heads, key_dim); keys of norm at most 1 with beta up to 2 keep it stable.
        v: (batch, seqlen, heads, value_dim).
        beta, log_decay: (batch, seqlen, heads, 1).
        state, document: as of :func:`linear_recurrence`.

    Returns:
        y (batch, seqlen, heads, value_dim) in v's dtype, and the state after the last step, in float32 at least.
    """
    c = _Chunks(q.shape[1], SCALAR_CHUNK, document, q.device)
    queries, keys, values, rates, steps = (c.cut(t) for t in (q, k, v, beta, log_decay))
    after = steps.cumsum(-2)
    total = after[..., -1:, :]
    decay, since_start = _decay(after, after, c.visible(diagonal=0)), after.exp() * c.reached
    earlier = (rates * _scores(keys, keys, decay)).tril(-1)
    written = torch.cat([values, keys * since_start], -1) * rates
    written = torch.linalg.solve_triangular(earlier, written, upper=False, unitriangular=True)
    fresh, forgotten = written.split([v.shape[-1], k.shape[-1]], -1)  # u = fresh - forgotten S, with S at the chunk's start
    scores = _scores(queries, keys, decay)
    reading = queries * since_start
    gathering = (keys * (total - after).exp() * c.kept).mT
    passing = total.exp() * c.passed[:, None, None]
    now = values.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state.to(values.dtype)
    parts = []
    for n in range(c.chunks):
        u = fresh[:, :, n] - forgotten[:, :, n] @ now
        parts.append(scores[:, :, n] @ u + reading[:, :, n] @ now)
        now = passing[:, :, n] * now + gathering[:, :, n] @ u
    y = torch.stack(parts, 2) if parts else values
    return c.join(y).to(v.dtype), now


def _decay(read: Tensor, after: Tensor, visible: Tensor) -> Tensor:
    """(batch, heads, chunks, t, s, key_dim or 1): what is left at t of what was written at s."""
    return (read.unsqueeze(-2) - after.unsqueeze(-3)).masked_fill(~visible[..., None], -torch.inf).exp()


def _scores(queries: Tensor, keys: Tensor, decay: Tensor) -> Tensor:
    """(batch, heads, chunks, t, s): q[t] k[s] under the decay from s to t."""
    if decay.shape[-1] == 1:
        return queries @ keys.mT * decay.squeeze(-1)
    return (queries.unsqueeze(-2) * keys.unsqueeze(-3) * decay).sum(-1)


def _at_borders(gathered: Tensor, total: Tensor, c: _Chunks, state: Tensor | None) -> Tensor:
    """States before the first chunk, between chunks, and after the last: (batch, heads, chunks + 1, key_dim, value_dim)."""
    first = gathered.new_zeros(*gathered.shape[:2], *gathered.shape[3:]) if state is None else state.to(gathered.dtype)
    sources = torch.cat([first.unsqueeze(2), gathered], 2)
    since = F.pad(total, (0, 0, 1, 0)).cumsum(2)  # (batch, heads, chunks + 1, key_dim or 1)
    decay = (since.unsqueeze(3) - since.unsqueeze(2)).masked_fill(~c.carried[..., None], -torch.inf).exp()
    if decay.shape[-1] == 1:
        return (decay.squeeze(-1) @ sources.flatten(3)).view(*sources.shape)
    return (decay.permute(0, 1, 4, 2, 3) @ sources.movedim(3, 2)).movedim(2, 3)


class _Chunks:
    """How a sequence is cut, and what of it may be seen from where."""

    def __init__(self, seqlen: int, chunk: int, document: Tensor | None, device: torch.device) -> None:
        self.seqlen, self.chunk = seqlen, max(min(chunk, seqlen), 1)
        self.chunks = -(-seqlen // self.chunk)
        self.pad = self.chunks * self.chunk - seqlen
        self.document = None
        ones = torch.ones(self.chunks, device=device, dtype=torch.bool)
        self.passed = ones  # (chunks,): whether a state comes through the chunk
        self.reached = self.kept = torch.ones(1, 1, device=device, dtype=torch.bool)  # (chunks, steps, 1), here of 1
        self.carried = torch.ones(self.chunks + 1, self.chunks + 1, device=device, dtype=torch.bool).tril()
        if document is not None:
            # The steps that fill up the last chunk belong to the last document.
            self.document = torch.cat([document, document[-1:].expand(self.pad)]).view(self.chunks, self.chunk)
            last = self.document[:, -1]
            before = torch.cat([self.document.flatten()[:1], last])  # the document that a border lies in
            self.reached = (self.document == before[:-1, None]).unsqueeze(-1)  # steps that see the state before the chunk
            self.kept = (self.document == last[:, None]).unsqueeze(-1)  # steps that the state behind it holds
            self.passed = before[:-1] == last
            self.carried = self.carried & (before[:, None] == before)

    def cut(self, t: Tensor) -> Tensor:
        """(batch, seqlen, heads, dim) to (batch, heads, chunks, steps, dim), in float32 at least, filled up with zeros."""
        t = t.to(torch.promote_types(t.dtype, torch.float32)).transpose(1, 2)
        return F.pad(t, (0, 0, 0, self.pad)).reshape(*t.shape[:2], self.chunks, self.chunk, t.shape[3])

    def join(self, t: Tensor) -> Tensor:
        """(batch, heads, chunks, steps, dim) to (batch, seqlen, heads, dim)."""
        return t.flatten(2, 3)[:, :, : self.seqlen].transpose(1, 2)

    def visible(self, diagonal: int) -> Tensor:
        """Whether step t of a chunk sees its step s: (chunks or 1, t, s)."""
        before = torch.ones(self.chunk, self.chunk, device=self.kept.device, dtype=torch.bool).tril(diagonal)
        return before if self.document is None else before & (self.document.unsqueeze(-1) == self.document.unsqueeze(-2))
