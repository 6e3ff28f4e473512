"""Cross-entropy of rows of logits, in Triton: one program per row, two passes.

    pass 1: the running maximum m and s = sum exp(z - m), rescaled as m rises (Milakov and Gimelshein 2018, arXiv 1805.02867)
    pass 2: z becomes exp(z - m - log s), less one at the target

A row is read twice and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program holds at a time
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf: two of those have no difference


def losses(logits: Tensor, targets: Tensor, ignore_index: int, differentiate: bool) -> Tensor:
    """The loss of each row, (rows,) float32; 0 for rows that are ignored. Turns the logits into their gradient if told to.

    Args:
        logits: (rows, vocab), the last axis dense; float32, bfloat16 or float16.
        targets: (rows,) int64.
    """
    rows, vocab = logits.shape
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(vocab), BLOCK)
    arguments = (logits, logits.stride(0), targets.contiguous(), found, vocab, ignore_index, differentiate, block)
    _row[(rows,)](*arguments, num_warps=8)  # pyright: ignore[reportCallIssue]
    return found


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    logits,  # (rows, vocab)
    stride,
    targets,  # (rows,)
    found,  # (rows,) float32
    vocab,
    ignore_index,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    scored = target != ignore_index
    within = (target >= 0) & (target < vocab)
    at_target = tl.load(logits + target, mask=within, other=float("nan")).to(tl.float32)  # before it is overwritten

    highest = LOWEST
    total = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(z))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher))
        highest = higher
    log_total = highest + tl.log(total)
    tl.store(found + row, tl.where(scored, log_total - at_target, 0.0))

    if DIFFERENTIATE:
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < vocab, other=0.0).to(tl.float32)
            dz = tl.exp(z - log_total) - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits + columns, tl.where(scored, dz, 0.0).to(logits.dtype.element_ty), mask=columns < vocab)
