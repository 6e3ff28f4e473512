"""The benchmark of attention: operations, masks, who takes which case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from madkernels import reference
from madkernels.benchmarks.attention import BENCHMARK, TRAINING, AttentionCase, _mask
from madkernels.benchmarks.cases import Case

PLAIN = AttentionCase(name="some", batch=1, seqlen=24, heads=4, kv_heads=2, head_dim=5, head_dim_v=3)
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window": 1},
    {"window": 7},
    {"window": 7, "causal": True},
    {"window": 24},
    {"window": 100, "causal": True},
    {"documents": 3},
    {"documents": 3, "causal": True},
    {"documents": 4, "window": 3, "causal": True},
    {"documents": 4, "window": 3},
    {"documents": 24, "window": 9},
)


def pairs_seen(case: AttentionCase) -> torch.Tensor:
    """Where a query of the reference has weight on a key: values are the unit vectors of keys, so outputs are weights."""
    unit = torch.eye(case.seqlen)[None, :, None]
    zeros = torch.zeros(1, case.seqlen, 1, 2)
    out = reference.attention(zeros, zeros, unit, **case.options)
    assert isinstance(out, torch.Tensor)
    return out[0, :, 0] > 0


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_operations_are_those_of_pairs_that_are_seen(mask: dict[str, Any]) -> None:
    case = replace(PLAIN, **mask)
    pairs = int(pairs_seen(case).sum())
    assert case.seen == pairs
    assert case.flops("forward") == 4 * pairs * 2 * (5 + 3)
    assert case.flops("backward") == 4 * pairs * 2 * (3 * 5 + 2 * 3)
    assert case.exponentials == 4 * pairs


def test_operations_of_a_batch() -> None:
    assert replace(PLAIN, batch=3, causal=True).flops("forward") == 3 * replace(PLAIN, causal=True).flops("forward")
    assert TRAINING.flops("forward") == 2 * 32 * (8192 * 8193 // 2) * 4 * 128


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_mask_of_peers_is_that_of_the_reference(mask: dict[str, Any]) -> None:
    case = replace(PLAIN, **mask)
    found = _mask(case.seqlen, case.length, case.causal, case.window, torch.device("cpu"))
    assert torch.equal(found, pairs_seen(case))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads is 3; expected a divisor of heads, 4"),
        ({"documents": 5}, "documents is 5; expected a divisor of seqlen, 24"),
        ({"documents": 3, "batch": 2}, "batch is 2; expected 1 with documents"),
        ({"window": 0}, "window is 0; expected an integer of at least 1"),
        ({"documents": True}, "documents is True; expected an integer of at least 1"),
    ],
)
def test_cases_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"case 'some': {message}"):
        replace(PLAIN, **change)


def test_offsets_go_to_the_device() -> None:
    options = replace(PLAIN, documents=3, causal=True).options_on(torch.device("meta"))
    assert options["cu_seqlens_q"].device.type == "meta"
    assert options["causal"] is True
    assert replace(PLAIN, documents=3).options["cu_seqlens_q"].tolist() == [0, 8, 16, 24]


def takers(case: Case) -> set[str]:
    return {peer.name for peer in BENCHMARK.peers if peer.accepts(case)}


def test_peers_take_what_they_can_do() -> None:
    everyone = {"sdpa", "sdpa-flash", "sdpa-math", "flex", "flex-forward", "flash-attn", "reference"}
    even = replace(PLAIN, head_dim_v=5)
    assert takers(even) == everyone
    assert takers(PLAIN) == everyone - {"sdpa-flash", "flash-attn"}
    assert takers(replace(even, documents=3)) == {"sdpa-mask", "flex", "flex-forward", "reference"}
    assert takers(replace(even, window=3)) == {"sdpa-mask", "flex", "flex-forward", "flash-attn", "reference"}
    assert takers(replace(even, alibi_slopes=True)) == {"flash-attn", "reference"}
    assert takers(replace(even, sink=True)) == {"reference"}
    named = {case.name: case for case in BENCHMARK.cases}
    assert takers(named["8k-64-causal"]) == everyone - {"sdpa-math", "reference"}  # too many scores to keep


def test_cases_are_those_of_the_page() -> None:
    names = [case.name for case in BENCHMARK.cases if not case.quick]
    sizes = [f"{seqlen}-{dim}{causal}" for seqlen in ("2k", "512", "8k") for dim in (64, 128) for causal in ("-causal", "")]
    assert names == [*sizes, "window", "documents", "gqa"]
