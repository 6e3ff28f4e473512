"""Attention and torch's own ways to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from madkernels import attention, reference
from madkernels.benchmarks.cases import Argument, Arguments, Axes, Case
from madkernels.benchmarks.harness import Benchmark, Peer


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """A call of attention. `window`: how many keys a query sees, its own included."""

    arguments: ClassVar[Arguments] = {
        "q": Argument(("batch", "seqlen", "heads", "head_dim")),
        "k": Argument(("batch", "seqlen", "kv_heads", "head_dim")),
        "v": Argument(("batch", "seqlen", "kv_heads", "head_dim_v")),
        "alibi_slopes": Argument(("batch", "heads"), "wide", optional=True),
        "sink": Argument(("heads",), "wide", optional=True),
    }
    out: ClassVar[Axes] = ("batch", "seqlen", "heads", "head_dim_v")
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    window: int | None = None
    alibi_slopes: bool = False
    sink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"case {self.name!r}: kv_heads is {self.kv_heads}; expected a divisor of heads, {self.heads}")

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal} | ({} if self.window is None else {"window": self.window})


def _case(name: str, seqlen: int, *, heads: int = 8, head_dim: int = 64, **further: Any) -> AttentionCase:
    sizes = {"batch": 1, "kv_heads": heads, "head_dim_v": head_dim} | further
    return AttentionCase(name=name, seqlen=seqlen, heads=heads, head_dim=head_dim, **sizes)


CASES = (
    _case("2k-64-causal", 2048, causal=True),
    _case("512-64-causal", 512, causal=True),
    _case("odd", 203, heads=6, kv_heads=2, head_dim=59, causal=True, quick=True),
)
TRAINING = _case("training", 8192, heads=32, head_dim=128, causal=True, batch=2)

BENCHMARK = Benchmark(
    name="attention",
    function=attention,
    reference=reference.attention,
    cases=CASES,
    training=TRAINING,
    peers=(Peer("reference", reference.attention, backward=True),),
)
