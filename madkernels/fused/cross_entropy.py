"""Cross-entropy of a linear layer, without all of its logits.

    loss = mean over scored tokens of  logsumexp(z) - z[target],    z = weight x + bias

The logits of a large vocabulary are the largest tensor of a language model's training. Here they exist for a chunk of tokens
at a time, and while they do, the forward turns them into their gradient, softmax(z) - onehot(target), in place, and adds up
what it means for x, weight and bias. The backward only scales, which is possible because the loss is one number. It costs an
accumulator of weight's shape between the two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels.tangents import has_tangent

CHUNK_TOKENS = 2048
_PLAIN = "F.cross_entropy(F.linear(x, weight, bias), targets)"


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """``F.cross_entropy(F.linear(x, weight, bias), targets)`` without the (tokens, vocab) logits.

    Products are computed in the dtype of x (under autocast in autocast's), logarithms and sums in float32 at least;
    gradients of weight and bias are summed over the chunks in float32, whatever the dtype of x.

    Args:
        x: (tokens, dim), float32, bfloat16 or float16; on the CPU float64 too.
        weight: (vocab, dim), any float dtype.
        targets: (tokens,) int64, from 0 to vocab - 1, or `ignore_index` for tokens that are not scored. Others are refused
            on the CPU; on a GPU, where the host would have to wait to see them, they make the loss NaN.
        bias: (vocab,).
        ignore_index: see `targets`.
        chunk_tokens: tokens whose logits are held at a time.

    Returns:
        () float32, or float64 for float64: the mean over the scored tokens. It is 0, with gradients of 0, where no token is
        scored; torch gives NaN there.

    Raises:
        ValueError: shapes or dtypes that do not fit. RuntimeError: a second derivative is asked for; there is none.
        NotImplementedError: a derivative in forward mode, or a transform of torch.func.
    """
    _check(x, weight, targets, bias, chunk_tokens)
    if not torch.compiler.is_compiling():
        _refuse_transforms(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    learned = (x, weight) if bias is None else (x, weight, bias)
    differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in learned)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, targets, bias, ignore_index, chunk_tokens, differentiate
    )
    return loss


def _refuse_transforms(*learned: Tensor | None) -> None:
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"linear_cross_entropy does not go through torch.func; {_PLAIN} does")
    if has_tangent(learned):
        raise NotImplementedError(f"linear_cross_entropy has no forward-mode derivative; {_PLAIN} has")


def _check(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk_tokens: int) -> None:
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and not t.is_floating_point():
            raise ValueError(f"{name} has dtype {t.dtype}; expected a float dtype")
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (tokens, dim)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (vocab, {x.shape[1]})")
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets has dtype {targets.dtype} and shape {tuple(targets.shape)}; expected int64 ({x.shape[0]},)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    if any(t.device != x.device for t in (weight, targets, bias) if t is not None):
        raise ValueError("x, weight, targets and bias are on different devices")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected a whole number from 1")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        chunk_tokens: int,
        differentiate: bool,
    ) -> Tensor:
        loss: Tensor
        loss, scored, dx, dweight, dbias = _op(x, weight, targets, bias, ignore_index, chunk_tokens, differentiate)
        ctx.save_for_backward(scored, dx, dweight, dbias)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # what was saved would pass for a constant
            raise RuntimeError(f"linear_cross_entropy has no second derivative; {_PLAIN} has")
        (dloss,) = grad_outputs
        scored, dx, dweight, dbias = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        scale = dloss / scored
        return (
            _scaled(dx, scale, x_dtype),
            _scaled(dweight, scale, weight_dtype),
            None,
            None if bias_dtype is None else _scaled(dbias, scale, bias_dtype),
            None,
            None,
            None,
        )


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32, although the gradient may be narrower: one over the number of tokens is nothing in float16."""
    scale = scale.view([1] * gradient.dim())  # of no dimension, it would be rounded to the gradient's dtype
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


@torch.library.custom_op("madkernels::linear_cross_entropy", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    chunk_tokens: int,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the number of scored tokens (at least 1), and the gradients of the sum of the tokens' losses: of x in its
    dtype, of weight and bias in float32 at least; empty if not asked for."""
    _check_range(targets, ignore_index, len(weight))
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(len(x), dtype=wide)
    dx, dweight, dbias = _gradients(x, weight, bias, differentiate)
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        for start in range(0, len(x), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            dlogits = F.linear(x[part], weight, bias)  # (chunk, vocab); logits, until the next line
            losses[part] = _losses(dlogits, targets[part], ignore_index, differentiate)
            if differentiate:
                torch.mm(dlogits, weight, out=dx[part])
                _add_outer(dweight, dlogits, x[part])
                dbias += dlogits.sum(0, dtype=wide)
            del dlogits  # before the next are made
    scored = (targets != ignore_index).sum().clamp_min(1).to(wide)
    return losses.sum() / scored, scored, dx, dweight, dbias


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    chunk_tokens: int,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return loss, torch.empty_like(loss), *_gradients(x, weight, bias, differentiate)


def _gradients(x: Tensor, weight: Tensor, bias: Tensor | None, differentiate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Space for the gradients of x, weight and bias, the last two at zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shapes = (x.shape, weight.shape, weight.shape[:1]) if differentiate else ((0,), (0,), (0,))
    return x.new_empty(shapes[0]), x.new_zeros(shapes[1], dtype=wide), x.new_zeros(shapes[2], dtype=wide)


def _check_range(targets: Tensor, ignore_index: int, vocab: int) -> None:
    if targets.device.type != "cpu":
        return
    wrong = targets[((targets < 0) | (targets >= vocab)) & (targets != ignore_index)]
    if len(wrong):
        raise ValueError(f"targets holds {wrong[0].item()}; expected 0 to {vocab - 1}, or {ignore_index} to ignore a token")


def _losses(logits: Tensor, targets: Tensor, ignore_index: int, differentiate: bool) -> Tensor:
    """The loss of each row, (chunk,) in float32 at least; turns the logits (chunk, vocab) into their gradient."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from madkernels.fused.cross_entropy_kernel import losses  # only a CUDA torch brings Triton

        return losses(logits, targets, ignore_index, differentiate)
    ignored = targets == ignore_index
    column = targets.masked_fill(ignored, 0).unsqueeze(1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_total = wide.logsumexp(1, keepdim=True)
    found = (log_total - wide.gather(1, column)).squeeze(1).masked_fill(ignored, 0)
    if differentiate:
        wide.sub_(log_total).exp_()
        wide.scatter_add_(1, column, wide.new_full(column.shape, -1.0))
        logits.copy_(wide.masked_fill_(ignored.unsqueeze(1), 0))
    return found


def _add_outer(total: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """total (vocab, dim) += dlogits' x, with products summed in total's dtype."""
    if dlogits.is_cuda and dlogits.dtype != total.dtype:
        total += torch.mm(dlogits.T, x, out_dtype=total.dtype)
    else:
        total.addmm_(dlogits.T.to(total.dtype), x.to(total.dtype))
