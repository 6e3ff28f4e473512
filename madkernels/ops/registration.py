"""What the ops share in telling torch about themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register_autocast(op: Callable[..., Any], name: str, activations: Collection[int]) -> None:
    """Under autocast, casts the arguments of `op` at the positions `activations`; parameters and states stay as they are."""
    for device, key in _AUTOCAST_KEYS.items():
        torch.library.impl(name, key)(_autocast_rule(op, device, key, activations))


def _autocast_rule(op: Callable[..., Any], device: str, key: str, activations: Collection[int]) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [_cast(a, dtype) if i in activations else a for i, a in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast)

    return cast_and_call


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def rows_like(t: Tensor) -> Tensor:
    """What an op allocates for a tensor like `t` (batch, seqlen, dim): of its layout, or contiguous if no axis is dense."""
    dense = t.stride(1) == 1 or t.stride(2) == 1
    return torch.empty_like(t) if dense else torch.empty_like(t, memory_format=torch.contiguous_format)


def if_given(argument: Tensor | None, gradient: Tensor) -> Tensor | None:
    """The gradient of an optional argument: kernels return an empty one where the argument is absent."""
    return None if argument is None else gradient


def differentiate_gradient(
    function: Callable[[Sequence[Any]], Sequence[Tensor]],
    arguments: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    weights: Sequence[Tensor],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of ``sum(weights * grad(function, arguments, cotangents))``, to any order.

    Args:
        function: from the arguments to outputs, differentiable as often as needed: an op's reference.
        arguments: its arguments, None where absent.
        cotangents: of its outputs, None where an output was not used.
        weights: of the gradient of each argument; ignored where the argument is absent.

    Returns:
        Gradients with respect to cotangents and to arguments, None where they are.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [_differentiable(t) for t in arguments]
        seeds = [_differentiable(t) for t in cotangents]
        pairs = [(o, s) for o, s in zip(function(inputs), seeds, strict=True) if s is not None]
        given = [t for t in inputs if t is not None]
        first = torch.autograd.grad(
            [o for o, _ in pairs], given, [s for _, s in pairs], create_graph=True, materialize_grads=True
        )
        kept = [w for t, w in zip(arguments, weights, strict=True) if t is not None]
        wanted = [t for t in (*seeds, *inputs) if t is not None]
        found = iter(torch.autograd.grad(first, wanted, kept, create_graph=create_graph, materialize_grads=True))
    return [t if t is None else next(found) for t in seeds], [t if t is None else next(found) for t in inputs]


def _differentiable(t: Tensor | None) -> Tensor | None:
    if t is None or t.requires_grad:
        return t
    return t.detach().requires_grad_()


def register_vmap(name: str, op: Callable[..., Any], arguments: Sequence[int | None], results: Sequence[int]) -> None:
    """Under vmap, one call for all maps: each is so many more channels, and channels do not mix.

    Gradients are taken outside, as by ``torch.func.vmap(f)(...).sum().backward()``: torch's custom operators do not go
    through ``torch.func.grad``.

    Args:
        name, op: what is registered.
        arguments: the axis of channels (or of groups of channels) of each argument; None for what has none, and cannot be
            mapped: offsets and flags.
        results: the axis of channels of each result; of one that comes back empty it is ignored.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        folded = [_fold(a, dim, axis, info.batch_size) for a, dim, axis in zip(args, in_dims, arguments, strict=True)]
        found = op(*folded)
        unfolded = [_unfold(t, axis, info.batch_size) for t, axis in zip(found, results, strict=True)]
        return tuple(t for t, _ in unfolded), tuple(dim for _, dim in unfolded)

    torch.library.register_vmap(name, rule)


def _fold(value: Any, dim: int | None, axis: int | None, size: int) -> Any:
    """The mapped axis `dim` into `axis` of what is left, map after map; an argument that is not mapped is repeated."""
    if not isinstance(value, Tensor) or axis is None:
        if dim is not None:
            raise ValueError("offsets of packed documents are the same for all maps; vmap cannot map over cu_seqlens")
        return value
    if dim is None:
        value = value.unsqueeze(axis).expand(*value.shape[:axis], size, *value.shape[axis:])
    else:
        value = value.movedim(dim, axis)
    return value.flatten(axis, axis + 1)


def _unfold(value: Tensor, axis: int, size: int) -> tuple[Tensor, int | None]:
    """The maps out of `axis` again, and where they are."""
    if value.dim() <= axis:
        return value, None
    shape = value.shape
    return value.view(*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :]), axis
