"""Attention and torch's own ways to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from madkernels import attention, reference
from madkernels.benchmarks.cases import Argument, Arguments, Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.attention import Attention

SCORES = 1 << 26  # up to which peers are timed that keep all of them in memory: some ten tensors of 256 MiB of float32


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """A call of attention. `window`: how many keys a query sees before it, its own included, and without `causal` as many
    after it. `documents`: how many of equal length are packed along the row."""

    arguments: ClassVar[Arguments] = {
        "q": Argument(("batch", "seqlen", "heads", "head_dim")),
        "k": Argument(("batch", "seqlen", "kv_heads", "head_dim")),
        "v": Argument(("batch", "seqlen", "kv_heads", "head_dim_v")),
        "alibi_slopes": Argument(("batch", "heads"), "wide", optional=True),
        "sink": Argument(("heads",), "wide", optional=True),
    }
    out: ClassVar[Axes] = ("batch", "seqlen", "heads", "head_dim_v")
    formula: ClassVar[str] = (
        "forward 2 (head_dim + head_dim_v), backward 2 (3 head_dim + 2 head_dim_v), for each head and key that a query sees"
    )
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    window: int | None = None
    documents: int | None = None
    alibi_slopes: bool = False
    sink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"case {self.name!r}: kv_heads is {self.kv_heads}; expected a divisor of heads, {self.heads}")
        if self.documents and self.seqlen % self.documents:
            raise ValueError(
                f"case {self.name!r}: documents is {self.documents}; expected a divisor of seqlen, {self.seqlen}"
            )
        if self.documents and self.batch > 1:
            raise ValueError(f"case {self.name!r}: batch is {self.batch}; expected 1 with documents")

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"causal": self.causal}
        if self.window is not None:
            options["window"] = self.window
        if self.documents is not None:
            options["cu_seqlens_q"] = torch.arange(self.documents + 1, dtype=torch.int32) * self.length
        return options

    @property
    def length(self) -> int:
        """Tokens that may see each other: of a document, or of the row."""
        return self.seqlen // (self.documents or 1)

    @property
    def seen(self) -> int:
        """Pairs of a query and a key that it sees, of one head: of those that are d apart, a document has length - |d|."""
        left = right = min(self.window or self.length, self.length) - 1
        right = 0 if self.causal else right
        pairs = sum(self.length - abs(d) for d in range(-right, left + 1))
        return self.batch * (self.documents or 1) * pairs

    def flops(self, direction: str) -> int:
        """Two products forward. Five backward, since scores are computed again rather than kept: with q, k and their
        gradients three of head_dim, with v and its gradient two of head_dim_v."""
        products = {"forward": (1, 1), "backward": (3, 2)}[direction]
        return 2 * (products[0] * self.head_dim + products[1] * self.head_dim_v) * self.heads * self.seen

    @property
    def exponentials(self) -> int:
        return self.heads * self.seen

    @property
    def independent(self) -> Axes:
        return ("kv_heads", "heads")

    @property
    def reference_values(self) -> int:
        return max(super().reference_values, self.batch * self.heads * self.seqlen * self.length)

    def scale(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        """Slopes as their paper has them, from 2^(-8 / heads) to 2^-8."""
        if not self.alibi_slopes:
            return inputs
        slopes = 2 ** (-8 * torch.arange(1.0, self.heads + 1) / self.heads)
        return inputs | {"alibi_slopes": slopes.repeat(self.batch, 1)}


def _case(name: str, seqlen: int, *, heads: int = 8, head_dim: int = 64, **further: Any) -> AttentionCase:
    sizes: dict[str, Any] = {"batch": 1, "kv_heads": heads, "head_dim_v": head_dim} | further
    return AttentionCase(name=name, seqlen=seqlen, heads=heads, head_dim=head_dim, **sizes)


def _plain_cases() -> Iterator[AttentionCase]:
    """The first is what is timed where nothing is said."""
    for name, seqlen in (("2k", 2048), ("512", 512), ("8k", 8192)):
        for head_dim in (64, 128):
            for causal in (True, False):
                yield _case(f"{name}-{head_dim}{'-causal' * causal}", seqlen, head_dim=head_dim, causal=causal)


CASES = (
    *_plain_cases(),
    _case("window", 8192, causal=True, window=256),
    _case("documents", 8192, causal=True, documents=16),
    _case("gqa", 2048, heads=32, kv_heads=8, head_dim=128, causal=True),
    _case("one", 1, heads=1, head_dim=1, sink=True, quick=True),  # without a sink, nothing would change its one weight
    _case("odd", 203, heads=6, kv_heads=2, head_dim=59, causal=True, quick=True),
    _case("uneven", 130, batch=2, heads=3, kv_heads=1, head_dim=40, head_dim_v=17, quick=True),
    _case("biased", 77, batch=2, heads=4, kv_heads=2, head_dim=24, causal=True, alibi_slopes=True, sink=True, quick=True),
    _case("near", 150, heads=2, head_dim=33, window=20, quick=True),
    _case("packed", 111, heads=4, kv_heads=2, head_dim=16, causal=True, documents=3, quick=True),
)
TRAINING = _case("training", 8192, heads=32, head_dim=128, causal=True, batch=2)


def case_of(size: Size) -> AttentionCase:
    """The attention of a model."""
    layer = size.layer("attention")
    assert isinstance(layer, Attention)
    return _case(size.name, size.seqlen, heads=layer.heads, head_dim=layer.head_dim, causal=True, batch=size.batch)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """torch's attention, by whichever of its ways it takes itself. It has heads before the sequence: views of ours."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def sdpa_by(backend: SDPBackend) -> Callable[..., Tensor]:
    """The same by one of the ways."""

    def function(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        with sdpa_kernel([backend]):
            return sdpa(q, k, v, causal=causal)

    return function


Sees = Callable[[Any, Any, Any, Any], Tensor]  # of batch row, head, query, key


def _sees(length: int, causal: bool, window: int | None) -> Sees:
    """Which query sees which key, as flex_attention asks for it; `length` of each document."""

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
        found: Tensor = query // length == key // length
        if causal:
            found = found & (query >= key)
        if window is not None:
            found = found & ((query - key).abs() < window)
        return found

    return sees


def _length(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    """Of each document: a case has them of equal length. Offsets are not read, which a GPU would have to wait for."""
    return q.shape[1] // (1 if cu_seqlens_q is None else cu_seqlens_q.numel() - 1)


@lru_cache(maxsize=2)
def _mask(seqlen: int, length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    at = torch.arange(seqlen, device=device)
    return _sees(length, causal, window)(0, 0, at[:, None], at)


def sdpa_mask(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, cu_seqlens_q: Tensor | None = None
) -> Tensor:
    """torch's attention under a mask of all pairs, made at the first call alone, as a model makes it once for all layers."""
    return sdpa(q, k, v, mask=_mask(q.shape[1], _length(q, cu_seqlens_q), causal, window, q.device))


@cache
def _flex(seqlen: int, length: int, causal: bool, window: int | None, device: torch.device) -> Callable[..., Any]:
    """flex_attention, compiled, with its mask by blocks, made at the first call alone."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    mask = flex.create_block_mask(_sees(length, causal, window), None, None, seqlen, seqlen, device=device)
    return partial(torch.compile(flex.flex_attention, dynamic=False), block_mask=mask)


def flex(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, cu_seqlens_q: Tensor | None = None
) -> Tensor:
    """torch's flex_attention, whose compiled kernels skip blocks of the mask that nobody sees."""
    function = _flex(q.shape[1], _length(q, cu_seqlens_q), causal, window, q.device)
    out: Tensor = function(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, alibi_slopes: Tensor | None = None
) -> Tensor:
    """The CUDA kernel of flash-attn, of 16-bit numbers, in our layout."""
    sides = (-1, -1) if window is None else (window - 1, window - 1)
    function = importlib.import_module("flash_attn").flash_attn_func
    out: Tensor = function(q, k, v, causal=causal, window_size=sides, alibi_slopes=alibi_slopes)
    return out


def _bare(case: Case) -> bool:
    """Without what adds to scores."""
    return isinstance(case, AttentionCase) and not (case.alibi_slopes or case.sink)


def _whole(case: Case) -> bool:
    """With no mask but the causal one."""
    return isinstance(case, AttentionCase) and _bare(case) and case.window is None and case.documents is None


def _masked(case: Case) -> bool:
    return _bare(case) and not _whole(case)


def _even(case: Case) -> bool:
    """Values as wide as keys."""
    return isinstance(case, AttentionCase) and case.head_dim == case.head_dim_v


def _small(case: Case) -> bool:
    """Few enough scores to keep."""
    return case.reference_values <= SCORES


def _takes_flash_attn(case: Case) -> bool:
    return isinstance(case, AttentionCase) and _even(case) and case.documents is None and not case.sink


BENCHMARK = Benchmark(
    name="attention",
    function=attention,
    reference=reference.attention,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        Peer("sdpa", sdpa, backward=True, accepts=_whole),
        Peer(
            "sdpa-flash",
            sdpa_by(SDPBackend.FLASH_ATTENTION),
            backward=True,
            accepts=lambda case: _whole(case) and _even(case),
        ),
        Peer("sdpa-math", sdpa_by(SDPBackend.MATH), backward=True, accepts=lambda case: _whole(case) and _small(case)),
        Peer("sdpa-mask", sdpa_mask, backward=True, accepts=_masked),
        Peer("flex", flex, backward=True, auto=False, devices=("cuda",), accepts=_bare),
        Peer("flex-forward", flex, auto=False, devices=("cpu",), accepts=_bare),  # on a CPU it has no backward
        Peer(
            "flash-attn",
            flash_attn,
            backward=True,
            needs="flash_attn:flash_attn_func",
            devices=("cuda",),
            accepts=_takes_flash_attn,
        ),
        Peer("reference", reference.attention, backward=True, accepts=_small),
    ),
)
