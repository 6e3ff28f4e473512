"""glu, as the tests of all ops see it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import OpCase
from torch import Tensor

from madkernels import glu
from madkernels.benchmarks.glu import GluCase


def mixes_up_gate_and_up(h: Tensor, **rest: Any) -> Any:
    return glu(h.roll(h.shape[-1] // 2, -1), **rest)


def forgets_the_activation(h: Tensor, **rest: Any) -> Any:
    gate, up = h.chunk(2, -1)
    return gate * up


CASE = OpCase(
    name="glu",
    kind=GluCase,
    sizes=("dim",),
    derived=lambda sizes: {"channels": 2 * sizes["dim"]},
    further=lambda inputs, options: {"activation": options["activation"]},
    variants=({"activation": "swiglu"}, {"activation": "geglu"}, {"activation": "reglu"}),
    has_second=lambda options: False,
    offsets=(),
    keeps_dtype=True,
    shapes=((1, 1, 1), (2, 65, 37), (1, 130, 16), (3, 43, 5), (1, 3, 1500)),
    regimes=((20,), (37,)),
    little=(6,),
    small=(3,),
    empty=((0, 5, 4), (2, 0, 4), (2, 5, 0)),
    any_shape=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 150)),
    refused=(4,),
    refusals=(
        ({"h": torch.zeros(10, 8, dtype=torch.int32)}, "h has dtype int32; it takes float32, bfloat16"),
        ({"h": torch.zeros(10, 7)}, "h has 7 channels; expected two halves"),
    ),
    mutants=(mixes_up_gate_and_up, forgets_the_activation),
)
