"""What every op promises: its meaning in every dtype and layout, documents, states, steps, torch's own rules, refusals.

`tests/cases/<op>.py` has what differs between ops. The last tests are of the tests: that wrong ops are caught.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import backends
import pytest
import torch
from cases import CASES
from checks import far_apart, misaligned, relative_error, relative_rms, strided, transposed
from hypothesis import assume, given, settings, strategies as st
from op_cases import DTYPES, Inputs, OpCase, Shape, changed, offsets_of
from torch import Tensor

from madkernels.benchmarks.cases import ROWS

pytestmark = pytest.mark.usefixtures("backend")
LENGTHS = [(5, 1, 0, 64, 33), (100,), (0, 0, 3), (2, 2, 2, 2), (31, 33, 64, 1), (150, 40)]


def as_it_is(t: Tensor) -> Tensor:
    return t


LAYOUTS = (as_it_is, transposed)


@pytest.fixture(params=CASES.values(), ids=CASES)
def op(request: pytest.FixtureRequest) -> OpCase:
    case: OpCase = request.param
    return case


def each(values: Callable[[OpCase], Any]) -> list[Any]:
    """An op and one of the values that its case has, for every op and value."""
    return [pytest.param(op, v, id=f"{op.name}-{getattr(v, '__name__', v)}") for op in CASES.values() for v in values(op)]


def rows_alone(op: OpCase) -> bool:
    """Whether its first argument is (batch, seqlen, dim), whose layout the output has."""
    return next(iter(op.arguments.values())).axes == ROWS


def each_that(has: Callable[[OpCase], bool]) -> Any:
    return pytest.mark.parametrize("op", [op for op in CASES.values() if has(op)], ids=lambda op: op.name)


each_with_state = each_that(lambda op: op.has_state)
each_with_documents = each_that(lambda op: op.has_documents)
each_regime = pytest.mark.parametrize(("op", "regime"), each(lambda op: op.regimes))
each_regime_with_documents = pytest.mark.parametrize(
    ("op", "regime"), each(lambda op: op.regimes if op.has_documents else ())
)


def laid_out(op: OpCase, inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs whose rows are laid out otherwise."""
    return changed(inputs, layout, op.rows)


def same_bits(op: OpCase, inputs: Inputs, others: Inputs) -> bool:
    pairs = zip(op.call(**inputs, **op.options), op.call(**others, **op.options), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---- its meaning


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shape"), each(lambda op: op.shapes))
def test_matches_reference(op: OpCase, shape: Shape, dtype: torch.dtype) -> None:
    """Every shape in every dtype; of options and layouts, which take turns, every pair in every dtype and in every shape."""
    index, turn = op.shapes.index(shape), DTYPES.index(dtype)
    options = op.variants[(index + turn) % len(op.variants)]
    layout = LAYOUTS[(index // 2 + turn // 2) % len(LAYOUTS)]
    op.check(laid_out(op, op.draw(*shape, dtype=dtype), layout), **options)


@each_regime
def test_optional_arguments(op: OpCase, regime: Shape) -> None:
    """None, all, each and all but each absent; with further options, none and all."""
    inputs, optional = op.draw(2, 40, *regime), op.names(optional=True)
    edges = [set[str](), set(optional)]
    calls = [(absent, op.options) for absent in (*edges, *({k} for k in optional), *({*optional} - {k} for k in optional))]
    calls += [(absent, options) for options in op.variants[1:] for absent in edges]
    for absent, options in calls:
        op.check({k: t for k, t in inputs.items() if k not in absent}, **options)


@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_any_shape(op: OpCase, backend: str, data: st.DataObject, dtype: torch.dtype, layout: Any) -> None:
    assume(backend == "cpu" or dtype != torch.float64)
    absent = data.draw(st.sets(st.sampled_from(optional))) if (optional := op.names(optional=True)) else ()
    inputs = op.draw(*data.draw(op.any_shape), dtype=dtype)
    options = data.draw(st.sampled_from(op.variants))
    op.check(laid_out(op, {k: t for k, t in inputs.items() if k not in absent}, layout), **options)


@pytest.mark.parametrize(("op", "shape"), each(lambda op: op.empty))
def test_empty(op: OpCase, shape: Shape) -> None:
    op.check(op.draw(*shape))


@pytest.mark.parametrize(("op", "regime"), each(lambda op: op.regimes if op.names(kind="parameter") else ()))
def test_float32_parameters_of_bfloat16_activations(op: OpCase, regime: Shape) -> None:
    inputs = op.draw(2, 40, *regime, dtype=torch.bfloat16)
    op.check(changed(inputs, Tensor.float, op.names(kind="parameter")))


# ---- layouts; tests/test_views.py has views that overlap themselves


@each_regime
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(strided, torch.float32), (misaligned, torch.bfloat16), (misaligned, torch.float32)],
    ids=["strided", "misaligned in bfloat16", "misaligned"],
)
def test_layouts(op: OpCase, regime: Shape, layout: Any, dtype: torch.dtype) -> None:
    inputs = op.draw(2, 75, *regime, dtype=dtype)
    moved = changed(inputs, layout, list(inputs))
    assert same_bits(op, moved, inputs)
    op.check(moved)


@each_regime
def test_part_of_a_wider_tensor(op: OpCase, regime: Shape) -> None:
    """As a layer cuts its projection into several."""
    inputs = op.draw(2, 40, *regime)
    cut = changed(inputs, lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]], op.rows)
    assert same_bits(op, cut, inputs)
    op.check(cut)


@each_regime
def test_offsets_beyond_32_bits(op: OpCase, regime: Shape) -> None:
    inputs = op.draw(2, 40, *regime, dtype=torch.float16)
    for name in op.names(kind="activation"):
        assert same_bits(op, changed(inputs, far_apart, [name]), inputs), name


@pytest.mark.parametrize(("op", "regime"), each(lambda op: op.regimes if rows_alone(op) else ()))
def test_transposed_view_stays_transposed(op: OpCase, regime: Shape) -> None:
    inputs = laid_out(op, op.draw(2, 40, *regime), transposed)
    assert op.call(**inputs, **op.options)[0].stride() == next(iter(inputs.values())).stride()


def test_gradient_of_a_sum(op: OpCase) -> None:
    """The gradient of the output is then an expanded scalar, with strides of zero."""
    inputs = {k: t.requires_grad_() for k, t in op.draw(2, 10, *op.small).items()}
    found, wanted = (
        torch.autograd.grad(function(**inputs, **op.options)[0].sum(), list(inputs.values()))
        for function in (op.call, op.reference)
    )
    for name, a, b in zip(inputs, found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda said, name=name: f"d{name}: {said}", rtol=1e-4, atol=1e-5)


# ---- documents and states


def check_packed(op: OpCase, lengths: tuple[int, ...], regime: Shape, function: Callable[..., Any] | None = None) -> None:
    inputs = laid_out(op, op.packed(lengths, *regime), LAYOUTS[LENGTHS.index(lengths) % 2])
    op.check(inputs, function, **op.documents(lengths))


@each_regime_with_documents
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_documents(op: OpCase, lengths: tuple[int, ...], regime: Shape) -> None:
    check_packed(op, lengths, regime)


@each_regime_with_documents
def test_packed_documents_equal_those_apart(op: OpCase, regime: Shape) -> None:
    """Whatever the options."""
    lengths = (30, 70, 3)
    bounds = enumerate(pairwise(offsets_of(lengths).tolist()))
    parts = [(i, slice(begin, end)) for i, (begin, end) in bounds]
    for options in op.variants:
        inputs = op.fit(op.packed(lengths, *regime), options)
        packed = op.call(**inputs, **options, **op.documents(lengths))
        states = op.names("sequences")
        alone = [
            op.call(**changed(op.rows_at(inputs, rows), lambda t, i=i: t[i : i + 1], states), **options) for i, rows in parts
        ]
        for axis, together, apart in zip(op.result_axes, packed, zip(*alone, strict=True), strict=False):
            assert relative_rms(together, torch.cat(apart, axis)) < 1e-6


@pytest.mark.parametrize(("op", "regime"), each(lambda op: op.regimes if op.has_state else ()))
@pytest.mark.parametrize("cut", [1, 20, 64])
def test_chunks_equal_the_whole(op: OpCase, regime: Shape, cut: int) -> None:
    inputs = op.draw(2, 65, *regime)
    out, final = op.call(**inputs, **op.options)
    first, state = op.call(**op.rows_at(inputs, slice(cut)), **op.options)
    rest = op.rows_at(inputs, slice(cut, None)) | {"initial_state": state}
    second, state = op.call(**rest, **op.options)
    assert relative_error(torch.cat([first, second], 1), out) < 1e-6
    assert_near(state, final, op.state_error)


# ---- steps


def assert_near(value: Tensor, wanted: Tensor, allowed: float) -> None:
    """The same bits where nothing is allowed."""
    if allowed:
        assert relative_error(value, wanted) < allowed
    else:
        assert torch.equal(value, wanted)


def arguments_of_step(op: OpCase, inputs: Inputs, t: int) -> dict[str, Any]:
    """Inputs of one step, but for its state, and the options that a step has."""
    known = {k: v for k, v in op.options.items() if k in inspect.signature(op.step).parameters}
    return {k: v for k, v in op.rows_at(inputs, t).items() if k != "initial_state"} | known


def check_steps(op: OpCase, shape: Shape, dtype: torch.dtype, step: Callable[..., Tensor]) -> None:
    """Compares steps with a call of the whole."""
    inputs = op.draw(3, 6, *shape[2:], dtype=dtype)
    out, final = op.call(**inputs, **op.options)
    state = inputs["initial_state"].clone()
    steps = [step(state, **arguments_of_step(op, inputs, t)) for t in range(6)]
    assert_near(torch.stack(steps, 1), out, op.step_error.get(dtype, 0.0))
    assert_near(state, final, op.state_error)


@each_with_state
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_by_step(op: OpCase, dtype: torch.dtype) -> None:
    for shape in op.shapes:
        check_steps(op, shape, dtype, op.step)


@each_with_state
def test_step_matches_reference(op: OpCase) -> None:
    for regime in op.regimes:
        inputs = op.draw(2, 1, *regime)
        found, wanted = (
            (function(state, **arguments_of_step(op, inputs, 0)), state)
            for function, state in ((f, inputs["initial_state"].clone()) for f in (op.step, op.reference_step))
        )
        assert all(relative_rms(a, b) < 1e-6 for a, b in zip(found, wanted, strict=True))


# ---- the same bits, and torch's own rules


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.backends("cpu")
@each_regime
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_whatever_the_threads(op: OpCase, regime: Shape, layout: Any) -> None:
    inputs = {k: t.requires_grad_() for k, t in laid_out(op, op.draw(3, 500, 200, *regime[1:]), layout).items()}

    def bits(count: int) -> list[Tensor]:
        with threads(count):
            results = op.call(**inputs, **op.options)
            return [*results, *torch.autograd.grad(sum(r.square().sum() for r in results), list(inputs.values()))]

    first, *others = [bits(count) for count in (1, 2, 3, 2)]
    assert all(torch.equal(a, b) for run in others for a, b in zip(first, run, strict=True))


@pytest.mark.parametrize(
    ("layout", "packed", "optional"),
    [(as_it_is, False, True), (transposed, True, True), (transposed, False, False), (as_it_is, True, False)],
    ids=["all", "documents", "least", "least of documents"],
)
def test_opcheck(op: OpCase, layout: Any, packed: bool, optional: bool) -> None:
    packed = packed and op.has_documents
    inputs = laid_out(op, op.packed((1, 3), *op.small) if packed else op.draw(1, 4, *op.small), layout)
    given = {k: t.requires_grad_() for k, t in (inputs if optional else op.least(inputs)).items()}
    if packed:
        given |= op.documents((1, 3))
    forward, backward = op.dispatched(), op.dispatched("_backward")
    arguments = op.dispatcher_arguments(given)
    torch.library.opcheck(forward, arguments)
    results = forward(*arguments)
    # Where there are offsets, its second gradient goes through the reference, which looks at them: eager mode only.
    if packed or not op.has_documents:
        given = {k: t.detach() for k, t in given.items()}
    torch.library.opcheck(backward, op.backward_arguments(given, results, torch.randn_like))


@each_with_state
def test_opcheck_step(op: OpCase) -> None:
    inputs = op.draw(2, 1, *op.small)
    given = op.rows_at(inputs, 0) | {"state": inputs["initial_state"]}
    torch.library.opcheck(op.dispatched("_step"), op.dispatcher_arguments(given, "_step"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compile_and_export(op: OpCase, dtype: torch.dtype) -> None:
    inputs = {k: t.requires_grad_() for k, t in op.draw(2, 40, *op.small, dtype=dtype).items()}

    class Layer(torch.nn.Module):
        def forward(self, given: Inputs) -> Tensor:
            out = op.function(**given, **op.options)
            assert isinstance(out, Tensor)
            return out * 2

    torch.compiler.reset()  # or the ops' layers would count as one that is compiled too often
    layer = Layer()
    plain = layer(inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs)
    assert torch.equal(plain, compiled)
    grads = [torch.autograd.grad(out.square().sum(), list(inputs.values())) for out in (plain, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        exported = torch.export.export(layer, (inputs,)).module()(inputs)
    assert torch.equal(plain, exported)


@each_regime
def test_autocast_casts_activations_only(op: OpCase, regime: Shape) -> None:
    inputs = op.draw(2, 40, *regime)
    halves = inputs if op.keeps_dtype else changed(inputs, Tensor.bfloat16, op.names(kind="activation"))
    with torch.autocast(backends.device().type, torch.bfloat16):
        found = op.call(**inputs, **op.options)
    assert found[0].dtype == (torch.float32 if op.keeps_dtype else torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(found, op.call(**halves, **op.options), strict=True))


# ---- refusals


@pytest.mark.parametrize(
    ("op", "refusal"), [pytest.param(op, r, id=f"{op.name}-{r[1]}") for op in CASES.values() for r in op.refusals]
)
def test_refusals(op: OpCase, refusal: tuple[Inputs, str]) -> None:
    change, message = refusal
    inputs = op.draw(2, 5, *op.refused) | {name: value.to(backends.device()) for name, value in change.items()}
    with pytest.raises(RuntimeError, match=f"{op.name}: .*{message}"):
        op.function(**inputs, **op.options)


@each_with_documents
def test_refuses_documents_of_several_rows(op: OpCase) -> None:
    with pytest.raises(RuntimeError, match=f"{op.name}: .*expected batch 1, got 2"):
        op.function(**op.draw(2, 5, *op.small), **op.documents((5,)))


@each_with_documents
@pytest.mark.backends("cpu")  # on a GPU the host would have to wait to see them
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "starts with 1; expected 0"),
        ([0, 4, 3, 5], "falls from 4 to 3 at index 2"),
        ([0, 3], "ends with 3; expected the seqlen, 5"),
    ],
)
def test_refuses_bad_offsets(op: OpCase, offsets: list[int], message: str) -> None:
    inputs = op.draw(1, 5, *op.small, docs=len(offsets) - 1)
    for name in op.offsets:
        given = op.documents((5,)) | {name: torch.tensor(offsets, dtype=torch.int32)}
        with pytest.raises(RuntimeError, match=f"{op.name}: {name} {message}"):
            op.function(**inputs, **given)
        with pytest.raises(RuntimeError, match=rf"{op.name}: {name} has dtype int64; .* it takes int32"):
            op.function(**inputs, **given | {name: torch.tensor(offsets)})


@each_with_state
@pytest.mark.parametrize("layout", [transposed, strided])
def test_step_refuses_a_state_it_cannot_update(op: OpCase, layout: Any) -> None:
    inputs = op.draw(2, 1, *op.small)
    with pytest.raises(RuntimeError, match=f"{op.name}_step: state must be contiguous"):
        op.step(layout(inputs["initial_state"]), **arguments_of_step(op, inputs, 0))


# ---- wrong on purpose: each must be caught by the checks above, which are the same on every backend


def mutants_of(op: OpCase) -> list[Callable[..., Any]]:
    """The op's own, and those that any op may have."""
    first, argument = next(iter(op.arguments.items()))
    steps = argument.axes.index("seqlen" if "seqlen" in argument.axes else "tokens")

    def sees_one_step_ahead(**inputs: Any) -> Any:
        return op.function(**inputs | {first: inputs[first].roll(-1, dims=steps)})

    def drops_the_carry(**inputs: Any) -> Any:
        return op.function(**inputs | {"initial_state": 0 * inputs["initial_state"]})

    def returns_zeros(**inputs: Any) -> Any:
        found = op.function(**inputs)
        return found * 0 if isinstance(found, Tensor) else (found[0] * 0, *found[1:])

    def drops_the_second_results_gradient(**inputs: Any) -> Any:
        out, second = op.function(**inputs)
        return out, second.detach() + 0 * out.sum()

    of_any = [sees_one_step_ahead, returns_zeros]
    of_two_results = [drops_the_second_results_gradient] if op.has_second(op.options) else []
    return [*op.mutants, *of_any, *of_two_results, *([drops_the_carry] if op.has_state else [])]


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(("op", "mutant"), each(mutants_of))
def test_mutants_are_caught(op: OpCase, mutant: Any) -> None:
    for regime in op.regimes:
        with pytest.raises(AssertionError, match="relative RMS error"):
            op.check(op.draw(2, 65, *regime), mutant)


@each_with_state
@pytest.mark.backends("cpu")
def test_a_state_that_crosses_documents_is_caught(op: OpCase) -> None:
    def joins_the_documents(cu_seqlens: Tensor, initial_state: Tensor, **inputs: Any) -> Any:
        _, states = op.function(**inputs, initial_state=initial_state, cu_seqlens=cu_seqlens)
        return op.function(**inputs | {"return_final_state": False}, initial_state=initial_state[:1]), states

    for regime in op.regimes:
        with pytest.raises(AssertionError, match="relative RMS error"):
            check_packed(op, LENGTHS[0], regime, joins_the_documents)


@each_with_state
@pytest.mark.backends("cpu")
def test_a_step_that_keeps_its_state_is_caught(op: OpCase) -> None:
    def forgets_the_update(state: Tensor, **rest: Any) -> Tensor:
        return op.step(state.clone(), **rest)

    with pytest.raises(AssertionError):
        check_steps(op, op.shapes[0], torch.float32, forgets_the_update)
