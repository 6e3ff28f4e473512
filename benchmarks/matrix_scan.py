"""matrix_scan, and the same in chunks by torch, as the layers have it on devices without a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels import matrix_scan, reference
from madkernels.benchmarks.cases import Argument, Arguments, Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.sizes import Size
from madkernels.models.layers.linear_attention import GatedLinearAttention
from madkernels.models.layers.matrix_state import in_chunks

KEYS: Axes = ("batch", "seqlen", "groups", "key_dim")
VALUES: Axes = ("batch", "seqlen", "heads", "value_dim")


@dataclass(frozen=True, kw_only=True)
class MatrixCase(Case):
    """A call of matrix_scan."""

    arguments: ClassVar[Arguments] = {
        "q": Argument(KEYS),
        "k": Argument(KEYS),
        "v": Argument(VALUES),
        "log_decay": Argument(("batch", "seqlen", "heads", "decay_dim"), "wide", optional=True),
        "beta": Argument(("batch", "seqlen", "heads"), "wide", optional=True),
        "bonus": Argument(("heads", "key_dim"), "wide", optional=True),
        "initial_state": Argument(("sequences", "heads", "key_dim", "value_dim"), "wide", optional=True),
    }
    out: ClassVar[Axes] = VALUES
    formula: ClassVar[str] = (
        "forward 4 key_dim value_dim, by the delta rule 6, backward twice as many, for each head and step"
    )
    heads: int
    key_dim: int
    value_dim: int
    groups: int
    decay_dim: int  # key_dim, or 1
    log_decay: bool = False
    beta: bool = False
    bonus: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.groups:
            raise ValueError(f"case {self.name!r}: groups is {self.groups}; expected a divisor of heads, {self.heads}")
        if self.decay_dim not in (1, self.key_dim):
            raise ValueError(f"case {self.name!r}: decay_dim is {self.decay_dim}; expected 1 or key_dim, {self.key_dim}")

    def flops(self, direction: str) -> int:
        """As the recurrence is stated: what a step adds, what is read of it, what the delta rule looks up."""
        once = (6 if self.beta else 4) * self.tokens * self.heads * self.key_dim * self.value_dim
        return once if direction == "forward" else 2 * once

    @property
    def independent(self) -> Axes:
        return ("heads",) if self.groups == 1 else ("groups", "heads")

    @property
    def reference_values(self) -> int:
        """The states of all steps, which the reference keeps for its backward."""
        return self.tokens * self.heads * self.key_dim * self.value_dim

    def scale(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        """Decays and rates as of layers at the start of training, and keys of norm 1 where the delta rule needs it."""
        scaled = {"q": inputs["q"] / self.key_dim**0.5}
        if self.beta:
            scaled |= {"k": F.normalize(inputs["k"], dim=-1), "beta": inputs["beta"].sigmoid()}
        if self.log_decay:
            scaled["log_decay"] = F.logsigmoid(inputs["log_decay"]) / 16
        return inputs | scaled


def _case(
    name: str, batch: int, seqlen: int, heads: int, key_dim: int, value_dim: int, *, groups: int | None = None,
    decay_dim: int | None = None, **further: Any,
) -> MatrixCase:  # fmt: skip
    return MatrixCase(
        name=name,
        batch=batch,
        seqlen=seqlen,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        groups=groups or heads,
        decay_dim=decay_dim or key_dim,
        **further,
    )


CASES = (
    _case("gla-small", 32, 128, 8, 16, 16, log_decay=True),
    _case("rwkv-small", 32, 128, 8, 16, 16, log_decay=True, bonus=True),
    _case("deltanet-small", 32, 128, 8, 16, 16, beta=True),
    _case("gla", 1, 1024, 4, 128, 256, log_decay=True),
    _case("rwkv", 1, 2048, 32, 64, 64, log_decay=True, bonus=True),
    _case("gated-deltanet", 1, 1024, 8, 128, 256, decay_dim=1, log_decay=True, beta=True),
    _case("one", 1, 1, 1, 1, 1, quick=True),
    _case("odd", 2, 67, 3, 5, 7, log_decay=True, quick=True),
    _case("odd-rwkv", 2, 67, 3, 5, 7, log_decay=True, bonus=True, quick=True),
    _case("odd-delta", 2, 67, 6, 20, 33, decay_dim=1, groups=3, log_decay=True, beta=True, quick=True),
)
TRAINING = _case("training", 8, 4096, 32, 64, 64, log_decay=True)


def case_of(size: Size) -> MatrixCase:
    """The scan of a gated-linear-attention layer of a model."""
    layer = size.layer("gated-linear-attention")
    assert isinstance(layer, GatedLinearAttention)
    return _case(size.name, size.batch, size.seqlen, layer.heads, layer.key_dim, layer.value_dim, log_decay=True)


def chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """In chunks of matrix products, by torch: what the layers do on devices without a kernel."""
    return in_chunks(q, k, v, log_decay, beta, bonus)[0]


BENCHMARK = Benchmark(
    name="matrix_scan",
    function=matrix_scan,
    reference=reference.matrix_scan,
    cases=CASES,
    training=TRAINING,
    of_model=case_of,
    peers=(
        Peer("chunks", chunks, backward=True),
        Peer("reference", reference.matrix_scan, auto=False),
    ),
)
