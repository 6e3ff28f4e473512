"""What the ops share in telling torch about themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from madkernels.tangents import has_tangent

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def overload(name: str) -> Any:
    """The op that is registered as "madkernels::...", from the schema in its C++ entry."""
    return getattr(getattr(torch.ops, name.partition("::")[0]), name.partition("::")[2]).default


def position(name: str, argument: str) -> int:
    """Where an argument stands in the schema of an op; a ValueError where it has none of that name."""
    names = [a.name for a in overload(name)._schema.arguments]
    if argument not in names:
        raise ValueError(f"{name} has no argument {argument!r}; it has {', '.join(names)}")
    return names.index(argument)


def register_autocast(name: str, activations: Collection[str]) -> None:
    """Under autocast, casts the arguments named `activations`; parameters and states stay as they are."""
    positions = {position(name, argument) for argument in activations}
    for device, key in _AUTOCAST_KEYS.items():
        torch.library.impl(name, key)(_autocast_rule(overload(name), device, key, positions))


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
    """What an op allocates for a tensor like `t` (batch, seqlen, dim): dense along time where only time is dense in `t`,
    else contiguous. Its other strides are not those of `t`, which may be an expanded view."""
    batch, seqlen, dim = t.shape
    if t.stride(2) != 1 and t.stride(1) == 1:
        return t.new_empty(batch, dim, seqlen).transpose(1, 2)
    return t.new_empty(t.shape)


def rows_of(x: Tensor) -> Tensor:
    """(..., channels) as (rows, channels): in place where what precedes the channels lies evenly."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2) if x.dim() > 2 else x


def needs_gradient(*values: Any) -> bool:
    """Whether a backward may follow: what it needs is then kept."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


Function = Callable[[Sequence[Any]], Sequence[Tensor]]

_kept: list[Any] = []


def keep_under_recomputation(name: str) -> None:
    """Says that selective recomputation keeps the op's results: they cost more to compute again than to remember."""
    _kept.append(overload(name))


def kept_under_recomputation() -> list[Any]:
    """The ops, of those imported, that :func:`keep_under_recomputation` named."""
    return list(_kept)


def register_gradient(
    name: str, gradient: Callable[..., Any], save: Callable[..., None], by_reference: Callable[..., Any]
) -> None:
    """What an op needs for derivatives: reverse mode by `gradient` from what `save` kept, as of torch's register_autograd;
    forward mode by torch's own, through `by_reference`, which takes the op's arguments and gives its results."""
    library = _WithForwardMode(name.partition("::")[0], by_reference)
    _libraries.append(library)
    torch.library.register_autograd(name, gradient, setup_context=save, lib=library)


_libraries: list[torch.library.Library] = []  # what is registered is taken back when they go


class _WithForwardMode(torch.library.Library):
    """Passes register_autograd's kernel on, but for calls that it does not serve: it drops tangents, and torch.func.grad
    refuses it."""

    def __init__(self, namespace: str, by_reference: Callable[..., Any]) -> None:
        super().__init__(namespace, "IMPL")  # type: ignore[no-untyped-call]
        self.by_reference = by_reference

    def impl(self, op_name: Any, fn: Callable[..., Any], *rest: Any, **options: Any) -> Any:
        def kernel(keyset: Any, *args: Any) -> Any:
            in_func_grad = torch._C._are_functorch_transforms_active() and torch._C._any_requires_grad(*args)
            return self.by_reference(*args) if in_func_grad or has_tangent(args) else fn(keyset, *args)

        return super().impl(op_name, kernel, *rest, **options)  # type: ignore[no-untyped-call]


def register_derivatives(
    name: str, differentiable: Sequence[str], by_reference: Callable[..., Any], only_kept: Sequence[str] = ()
) -> None:
    """Reverse, second and forward derivatives of an op, from its schema and that of its backward, `<name>_backward`.

    The backward takes the gradients of the op's first two results (of the second None where it is not used), then arguments
    and results of the op by the same names.

    Args:
        name: of the op.
        differentiable: its arguments whose gradients the backward gives, in this order; an empty one where one is absent.
        by_reference: takes the op's arguments and gives its results; those that the backward does not take have defaults.
        only_kept: results that are there for the backward alone, which has no gradients of them.
    """
    backward = overload(f"{name}_backward")
    given = [a.name for a in overload(name)._schema.arguments]
    results = [r.name for r in overload(name)._schema.returns]
    seeds = [f"gradient of {name}" for name in results[:2] if name not in only_kept]
    taken = [a.name for a in backward._schema.arguments][len(seeds) :]
    tensors = {a.name for a in backward._schema.arguments if "Tensor" in str(a.type)}

    def keep(ctx: Any, values: dict[str, Any]) -> None:
        ctx.save_for_backward(*(value for key, value in values.items() if key in tensors))
        ctx.options = {key: value for key, value in values.items() if key not in tensors}

    def kept(ctx: Any, keys: Sequence[str]) -> dict[str, Any]:
        found = iter(ctx.saved_tensors)
        return {key: next(found) if key in tensors else ctx.options[key] for key in keys}

    def function(values: dict[str, Any]) -> Function:
        """The reference, as a function of what can be differentiated."""
        rest = [key for key in given if key in values]

        def call(arguments: Sequence[Any]) -> Sequence[Tensor]:
            replaced = values | dict(zip(differentiable, arguments, strict=True))
            return several(by_reference(*(replaced[key] for key in rest)))[: len(seeds)]

        return call

    def save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor] | Tensor) -> None:
        output = several(output)
        values = dict(zip(given, inputs, strict=True)) | dict(zip(results, output, strict=True))
        keep(ctx, {key: values[key] for key in taken})
        ctx.mark_non_differentiable(*(values[key] for key in only_kept))
        ctx.out = output[0].shape, output[0].dtype
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, dout: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        values = kept(ctx, taken)
        if dout is None:
            shape, dtype = ctx.out
            dout = values[differentiable[0]].new_zeros(shape, dtype=dtype)
        # Of a state that was not asked for, which comes back empty, there is none.
        further = [None if t is None or t.shape == (0,) else t for t in others[: len(seeds) - 1]]
        found = several(backward(dout, *further, *values.values()))
        gradients = dict(zip(differentiable, found, strict=True))
        return tuple(None if values.get(key) is None else gradients.get(key) for key in given)

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        keep(ctx, dict(zip((*seeds, *taken), inputs, strict=True)))

    def second_gradient(ctx: Any, *weights: Tensor) -> tuple[Any, ...]:
        values = kept(ctx, (*seeds, *taken))
        arguments, given = [values[key] for key in differentiable], [values[key] for key in seeds]
        cotangents, found = differentiate_gradient(function(values), arguments, given, weights)
        gradients = dict(zip(differentiable, found, strict=True))
        return (*cotangents, *(gradients.get(key) for key in taken))

    def gradient_by_reference(*inputs: Any) -> Sequence[Tensor] | Tensor:
        values = dict(zip((*seeds, *taken), inputs, strict=True))
        arguments, given = [values[key] for key in differentiable], [values.pop(key) for key in seeds]
        found = differentiate(function(values), arguments, given)
        return found if len(found) > 1 else found[0]

    tensors |= set(seeds)
    register_gradient(name, gradient, save, by_reference)
    register_gradient(f"{name}_backward", second_gradient, save_backward, gradient_by_reference)


def several(found: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
    """The results of an op, of which torch hands out one by itself."""
    return (found,) if isinstance(found, Tensor) else found


def refuse_tangents(name: str, *values: Any) -> None:
    """Raises for a step, which writes over the state that a tangent belongs to."""
    if has_tangent(values):
        op = name.removesuffix("_step")
        raise NotImplementedError(
            f"{name} has no derivative, since it updates its state in place; {op} has: give it a sequence of length 1, the "
            "state as initial_state, and return_final_state=True"
        )


def differentiate(
    function: Function, arguments: Sequence[Tensor | None], seeds: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """The gradients of the results of `function`, each times its seed, as the ops return them: empty where an argument is
    absent. They can be differentiated again."""
    with torch.enable_grad():
        inputs = [_differentiable(t) for t in arguments]
        found = iter(_gradients(function, inputs, seeds))
    empty = next(t for t in seeds if t is not None).new_empty(0)
    return tuple(empty if t is None else next(found) for t in arguments)


def _gradients(function: Function, inputs: Sequence[Any], seeds: Sequence[Tensor | None]) -> Sequence[Tensor]:
    pairs = [(o, s) for o, s in zip(function(inputs), seeds, strict=True) if s is not None]
    outputs, given = [o for o, _ in pairs], [t for t in inputs if t is not None]
    return torch.autograd.grad(outputs, given, [s for _, s in pairs], create_graph=True, materialize_grads=True)


def differentiate_gradient(
    function: Function,
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
        first = _gradients(function, inputs, seeds)
        kept = [w for t, w in zip(arguments, weights, strict=True) if t is not None]
        wanted = [t for t in (*seeds, *inputs) if t is not None]
        found = iter(torch.autograd.grad(first, wanted, kept, create_graph=create_graph, materialize_grads=True))
    return [t if t is None else next(found) for t in seeds], [t if t is None else next(found) for t in inputs]


def _differentiable(t: Tensor | None) -> Tensor | None:
    """A tensor to differentiate by: a node of its own, behind which no other argument lies in the graph."""
    if t is None:
        return t
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


Axis = int | tuple[int, int] | None


def register_vmap(
    name: str, channels: Mapping[str, Axis], results: Sequence[int], op: Callable[..., Any] | None = None
) -> None:
    """Under vmap, one call for all maps: each is so many more channels, and channels do not mix.

    Gradients are best taken outside, as by ``torch.func.vmap(f)(...).sum().backward()``: those of ``torch.func.grad`` go
    through the reference.

    Args:
        name: what is registered.
        channels: by argument the axis of its channels (or of groups of channels), (axis, rank) where it may be left out of a
            tensor of this rank. What is not named has none and cannot be mapped: offsets and flags.
        results: the axis of channels of each result; of one that comes back empty it is ignored.
        op: what is called, if not the op itself.
    """
    call = op or overload(name)
    axes: list[Axis] = [None] * len(overload(name)._schema.arguments)
    for argument, axis in channels.items():
        axes[position(name, argument)] = axis

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        folded = [_fold(a, dim, axis, info.batch_size) for a, dim, axis in zip(args, in_dims, axes, strict=True)]
        found = call(*folded)
        unfolded = [_unfold(t, axis, info.batch_size) for t, axis in zip(found, results, strict=True)]
        return tuple(t for t, _ in unfolded), tuple(dim for _, dim in unfolded)

    torch.library.register_vmap(name, rule)


def register_vmap_one_by_one(name: str, op: Callable[..., Any] | None = None) -> None:
    """Under vmap, one call a map: for an op whose maps cannot be told apart from one another in a single call.

    Args:
        name: what is registered.
        op: what is called, if not the op itself.
    """
    call = op or overload(name)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        found = [call(*_map(args, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        stacked = [torch.stack(results) for results in zip(*found, strict=True)]
        return tuple(stacked), (0,) * len(stacked)

    torch.library.register_vmap(name, rule)


def _map(args: Sequence[Any], dims: Sequence[int | None], i: int) -> list[Any]:
    return [a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True)]


def _fold(value: Any, dim: int | None, axis: Axis, size: int) -> Any:
    """The mapped axis `dim` into `axis` of what is left, map after map; an argument that is not mapped is repeated."""
    if not isinstance(value, Tensor) or axis is None:
        if dim is not None:
            raise ValueError("offsets of packed documents are the same for all maps; vmap cannot map over cu_seqlens")
        return value
    rank = value.dim() - (dim is not None)
    axis, full_rank = axis if isinstance(axis, tuple) else (axis, rank)
    if dim is None:
        value = value.unsqueeze(axis).expand(*value.shape[:axis], size, *value.shape[axis:])
    else:
        value = value.movedim(dim, axis)
    return value.flatten(axis, axis + 1) if rank == full_rank else value


def _unfold(value: Tensor, axis: int, size: int) -> tuple[Tensor, int | None]:
    """The maps out of `axis` again, and where they are."""
    if value.dim() <= axis:
        return value, None
    shape = value.shape
    return value.view(*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :]), axis
