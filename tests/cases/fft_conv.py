"""fft_conv, as the tests of all ops see it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from op_cases import Inputs, OpCase, Options, Shape
from torch import Tensor

from madkernels import fft_conv
from madkernels.benchmarks.fft_conv import LongConvCase


def is_causal(options: Options) -> bool:
    return bool(options.get("causal", True))


def scale(inputs: Inputs) -> Inputs:
    """Filters whose sums are at unit scale."""
    return inputs | {"filter": inputs["filter"] / inputs["filter"].shape[-1] ** 0.5}


def fit(inputs: Inputs, options: Options) -> Inputs:
    """A convolution that is not causal has no state."""
    return inputs if is_causal(options) else {k: t for k, t in inputs.items() if k != "initial_state"}


def shape_of(batch: int, seqlen: int, groups: int, shared: int, taps: int) -> Shape:
    return batch, seqlen, groups * shared, groups, taps


def wraps_around(u: Tensor, filter: Tensor, skip: Tensor, pre_gate: Tensor, post_gate: Tensor, **rest: Any) -> Any:
    v = u * pre_gate
    taps = filter.repeat_interleave(u.shape[2] // filter.shape[0], 0)
    spectra = torch.fft.rfft(v, dim=1) * torch.fft.rfft(taps.T, n=v.shape[1], dim=0)
    _, state = fft_conv(u, filter, pre_gate=pre_gate, **rest)
    return post_gate * (torch.fft.irfft(spectra, n=v.shape[1], dim=1) + v * skip), state


def forgets_the_skip(skip: Tensor, **inputs: Any) -> Any:
    return fft_conv(**inputs, skip=0 * skip)


def gates_twice(post_gate: Tensor, **inputs: Any) -> Any:
    return fft_conv(**inputs, post_gate=post_gate * post_gate)


CASE = OpCase(
    name="fft_conv",
    kind=LongConvCase,
    sizes=("dim", "groups", "filter_len"),
    derived=lambda sizes: {"history": sizes["filter_len"] - 1},
    scale=scale,
    fit=fit,
    variants=({"causal": True}, {"causal": False}),
    has_second=is_causal,
    shapes=(
        (2, 65, 37, 37, 65),  # as long as the sequence
        (1, 300, 16, 16, 300),
        (3, 1, 5, 5, 1),
        (2, 3, 20, 20, 7),  # longer
        (1, 200, 33, 11, 17),  # short, shared
        (2, 256, 4, 1, 256),
        (1, 90, 3, 3, 400),
        (2, 5, 36, 12, 2),
    ),
    regimes=((20, 20, 4), (20, 5, 150)),  # tap by tap, and by transforms
    little=(6, 3, 17),
    small=(4, 2, 5),
    empty=((0, 5, 4, 4, 3), (2, 0, 4, 4, 3), (2, 5, 0, 0, 3), (0, 0, 0, 0, 1), (2, 0, 4, 4, 300)),
    any_shape=st.builds(
        shape_of, st.integers(1, 3), st.integers(1, 200), st.integers(1, 9), st.integers(1, 5), st.integers(1, 250)
    ),
    step_error={torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6, torch.float64: 1e-14},
    refused=(4, 4, 7),
    refusals=(
        ({"u": torch.zeros(2, 5)}, r"u has shape \(2, 5\); expected \(batch, seqlen, dim\)"),
        ({"u": torch.zeros(2, 5, 4, dtype=torch.int32)}, "u has dtype int32; it takes float32, bfloat16"),
        ({"filter": torch.zeros(3, 7)}, "filter has 3 groups, which do not divide the dim of u, 4"),
        ({"filter": torch.zeros(0, 7)}, "filter has 0 groups"),
        ({"filter": torch.zeros(4, 0)}, "with one tap at least"),
        ({"filter": torch.zeros(4)}, r"filter has shape \(4,\); expected \(groups, filter_len\)"),
        ({"filter": torch.zeros(4, 7, dtype=torch.float16)}, "filter has dtype float16; .* it takes float32"),
        ({"skip": torch.zeros(3)}, r"skip has shape \(3,\); expected \(4,\)"),
        ({"pre_gate": torch.zeros(2, 5, 3)}, r"pre_gate has shape \(2, 5, 3\); expected \(2, 5, 4\)"),
        ({"post_gate": torch.zeros(2, 5, 4).half()}, "post_gate has dtype float16"),
        ({"initial_state": torch.zeros(2, 7, 4)}, "initial_state has 7 inputs; expected at most filter_len - 1, 6"),
        ({"initial_state": torch.zeros(3, 6, 4)}, r"initial_state has shape \(3, 6, 4\); expected \(2, 6, 4\)"),
    ),
    mutants=(wraps_around, forgets_the_skip, gates_twice),
)
