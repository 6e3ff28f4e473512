"""What only moe_route has: which expert gets which token, and rows to experts and back.

tests/test_op_contract.py has what every op promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import backends
import pytest
import torch
from checks import check, misaligned, relative_rms, strided, transposed
from hypothesis import given, settings, strategies as st
from op_cases import DTYPES
from torch import Tensor

from madkernels import RoutingPlan, moe_combine, moe_dispatch, moe_route, reference

pytestmark = pytest.mark.usefixtures("backend")
on_cpu = pytest.mark.backends("cpu")  # where alone threads are counted, and float64 is taken
INDICES = ("experts", "offsets", "counts", "slots", "rows")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(backends.device(), dtype)


def tensors_of(plan: RoutingPlan) -> dict[str, Tensor]:
    return plan._asdict()


def check_plan(logits: Tensor, top_k: int, function: Callable[..., RoutingPlan] = moe_route, **options: Any) -> RoutingPlan:
    """Compares a plan with the reference's of the same logits in float64: what is an index exactly."""
    plan = function(logits, top_k, **options)
    wide = {k: v.cpu().double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = tensors_of(reference.moe_route(logits.cpu().double(), top_k, **wide))
    for name, value in tensors_of(plan).items():
        found = value.cpu()
        assert found.shape == exact[name].shape, name
        if name in INDICES:
            assert found.dtype == torch.int32, name
            assert torch.equal(found, exact[name]), name
        else:
            assert found.dtype == torch.promote_types(logits.dtype, torch.float32), name
            assert relative_rms(found, exact[name]) < 1e-6, name
    return plan


def check_places(plan: RoutingPlan, count: int, capacity: int | None) -> None:
    """That rows are what a loop over tokens makes of the experts, whoever chose them."""
    experts = plan.experts.tolist()
    takes: list[list[int]] = [[] for _ in range(count)]
    top_k = plan.experts.shape[1]
    for token, chosen in enumerate(experts):
        for k, expert in enumerate(chosen):
            takes[expert].append(token * top_k + k)
    assert plan.counts.tolist() == [len(pairs) for pairs in takes]
    kept = [pairs[:capacity] for pairs in takes]
    slots = [pair for pairs in kept for pair in pairs]
    assert plan.offsets.tolist() == [sum(len(pairs) for pairs in kept[:e]) for e in range(count + 1)]
    assert plan.slots.tolist() == slots + [-1] * (len(experts) * top_k - len(slots))
    wanted = {pair: row for row, pair in enumerate(slots)}
    assert plan.rows.flatten().tolist() == [wanted.get(pair, -1) for pair in range(len(experts) * top_k)]
    assert int(plan.dropped) == len(experts) * top_k - len(slots)


# ---- which expert


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"renormalize": False}, {"score": "sigmoid"}, {"score": "sigmoid", "renormalize": False}, {"capacity": 3},
        {"groups": (4, 2)}, {"score": "sigmoid", "groups": (8, 3), "capacity": 11}, {"groups": (24, 7)}, {"groups": (2, 1)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "top_k"), [(70, 3), (1, 1), (33, 7)])
def test_plan(tokens: int, top_k: int, biased: bool, options: dict[str, Any], dtype: torch.dtype) -> None:
    """In bfloat16 many logits are equal."""
    wide = torch.promote_types(dtype, torch.float32)
    bias = {"bias": drawn(24, dtype=wide) / 8} if biased else {}
    plan = check_plan(drawn(tokens, 24, dtype=dtype), top_k, **options, **bias)
    check_places(plan, 24, options.get("capacity"))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(0, 5, 2), (1, 1, 1), (3, 4096, 8), (40, 4096, 1), (2, 300, 300), (65, 7, 7), (129, 130, 64), (300, 2, 1)],
)
@pytest.mark.parametrize("capacity", [None, 0, 1, 50, 2**40])
def test_sizes(tokens: int, experts: int, top_k: int, capacity: int | None) -> None:
    check_places(check_plan(drawn(tokens, experts), top_k, capacity=capacity), experts, capacity)


@on_cpu
@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), score=st.sampled_from(["softmax", "sigmoid"]))
def test_any_options(data: st.DataObject, dtype: torch.dtype, score: str) -> None:
    groups, size, tokens = (data.draw(st.integers(*limits)) for limits in ((1, 6), (1, 9), (0, 150)))
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    capacity = data.draw(st.none() | st.integers(0, 60))
    logits = drawn(tokens, groups * size, dtype=dtype)
    check_places(
        check_plan(logits, top_k, score=score, groups=(groups, top_groups), capacity=capacity), groups * size, capacity
    )


@pytest.mark.parametrize("options", [{}, {"groups": (4, 2)}, {"score": "sigmoid"}], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_of_equal_scores_the_lowest_expert(options: dict[str, Any], biased: bool) -> None:
    logits = torch.tensor([[0.0] * 16, [-0.0, 0.0] * 8, [1.0, 2.0] * 8], device=backends.device())
    plan = check_plan(logits, 4, **options, **({"bias": torch.zeros(16, device=logits.device)} if biased else {}))
    assert plan.experts[:2].tolist() == [[0, 1, 2, 3]] * 2
    assert plan.experts[2].tolist() == [1, 3, 5, 7]


def test_all_tokens_to_one_expert() -> None:
    logits = drawn(150, 9)
    logits[:, 5] += 100
    plan = check_plan(logits, 1, capacity=140)
    assert plan.counts.tolist() == [0] * 5 + [150] + [0] * 3
    assert plan.rows.flatten().tolist() == [*range(140), *[-1] * 10]  # the first tokens are kept
    assert plan.weights.flatten().tolist() == [1.0] * 140 + [0.0] * 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"score": "sigmoid"}, {"groups": (3, 2)}, {"renormalize": False}], ids=str)
def test_special_values(options: dict[str, Any], value: float) -> None:
    """NaN comes first, and equals NaN; weights are what arithmetic gives. Other tokens are as before."""
    logits = drawn(70, 12)
    plain = moe_route(logits, 3, **options)
    logits[40, 7] = logits[40, 2] = logits[66] = value
    plan, exact = (f(logits, 3, **options) for f in (moe_route, reference.moe_route))
    assert torch.equal(plan.experts, exact.experts)
    assert torch.equal(plan.rows, exact.rows)
    assert torch.equal(plan.weights.isnan(), exact.weights.isnan())
    assert torch.equal(plan.mean_probs.isnan(), exact.mean_probs.isnan())
    others = [t for t in range(70) if t not in (40, 66)]
    assert torch.equal(plan.weights[others], plain.weights[others])
    if value != value and "groups" not in options and options.get("score") == "sigmoid":
        assert plan.experts[40, :2].tolist() == [2, 7]


def test_order_is_that_of_logits_where_scores_round_to_the_same() -> None:
    logits = torch.tensor([[30.0, 40.0, 50.0, -200.0, -150.0]], device=backends.device())
    for score in ("softmax", "sigmoid"):
        assert moe_route(logits, 5, score=score).experts.tolist() == [[2, 1, 0, 4, 3]]


def test_softmax_of_the_chosen_where_all_of_them_underflow() -> None:
    """A bias chooses experts that have no share worth a float."""
    logits = torch.tensor([[0.0, -200.0, -201.0]], device=backends.device(), requires_grad=True)
    plan = moe_route(logits, 2, bias=torch.tensor([-5.0, 1.0, 0.5], device=logits.device))
    assert plan.experts.tolist() == [[1, 2]]
    torch.testing.assert_close(plan.weights.cpu(), torch.tensor([[1.0, -1.0]]).sigmoid())
    plan.weights[0, 0].backward()
    slope = float(plan.weights.detach().prod())
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor([[0.0, slope, -slope]]))


# ---- losses, jitter


def test_load_balance_is_one_where_all_is_equal() -> None:
    """And as many as there are experts, where one has it all."""
    even = moe_route(10 * torch.eye(8, device=backends.device()), 1)
    assert even.counts.tolist() == [1] * 8
    torch.testing.assert_close(float(even.load_balance_loss), 1.0)
    logits = torch.zeros(8, 8, device=backends.device())
    logits[:, 3] = 100
    torch.testing.assert_close(float(moe_route(logits, 1).load_balance_loss), 8.0)
    nobody = moe_route(torch.zeros(0, 8, device=backends.device()), 2)
    assert float(nobody.load_balance_loss) == float(nobody.z_loss) == 0.0


def test_losses_are_differentiable() -> None:
    logits = drawn(40, 6).requires_grad_()
    found, wanted = (
        torch.autograd.grad(plan.load_balance_loss + 0.1 * plan.z_loss, logits)[0]
        for plan in (f(logits, 2) for f in (moe_route, reference.moe_route))
    )
    assert float(found.abs().max()) > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_jitter_multiplies_logits_by_what_torch_draws() -> None:
    logits = drawn(50, 8, dtype=torch.bfloat16)
    torch.manual_seed(3)
    plan = moe_route(logits, 2, jitter=0.3)
    torch.manual_seed(3)
    noise = torch.empty(50, 8, device=logits.device).uniform_(0.7, 1.3)
    wanted = moe_route(logits.float() * noise, 2)
    assert all(torch.equal(a, b) for a, b in zip(plan, wanted, strict=True))
    assert not torch.equal(plan.experts, moe_route(logits, 2).experts)


# ---- rows to experts and back


def routed(tokens: int, experts: int, top_k: int, capacity: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    return moe_route(drawn(tokens, experts, dtype=dtype), top_k, capacity=capacity)


def through(x: Tensor, plan: RoutingPlan) -> Tensor:
    return moe_combine(moe_dispatch(x, plan), plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "dim"), [(70, 3, 37), (65, 1, 64), (0, 2, 8), (9, 2, 0), (20, 5, 1040), (3, 2, 1)]
)
@pytest.mark.parametrize("capacity", [None, 0, 7])
def test_dispatch_and_combine(tokens: int, top_k: int, dim: int, capacity: int | None, dtype: torch.dtype) -> None:
    """Values, and gradients of rows and weights."""
    plan = routed(tokens, 6, top_k, capacity, dtype)

    def dispatched(function: Any) -> Any:
        return lambda x: (function(x, plan),)

    def combined(function: Any) -> Any:
        return lambda y, weights: (function(y, plan._replace(weights=weights)),)

    x, y = drawn(tokens, dim, dtype=dtype), drawn(tokens * top_k, dim, dtype=dtype)
    check(dispatched(moe_dispatch), dispatched(reference.moe_dispatch), {"x": x})
    check(combined(moe_combine), combined(reference.moe_combine), {"y": y, "weights": plan.weights.detach()})


def test_there_and_back_is_the_token_itself() -> None:
    """Since its weights add up to 1; what is dropped is missing from it."""
    x = drawn(100, 33)
    assert relative_rms(through(x, routed(100, 8, 3)), x) < 1e-6
    plan = routed(100, 8, 3, capacity=20)
    assert int(plan.dropped) > 0
    assert relative_rms(through(x, plan), x * plan.weights.sum(1, keepdim=True)) < 1e-6


@pytest.mark.parametrize("layout", [transposed, strided, misaligned, lambda t: t[:1].expand(t.shape)])
def test_layouts_of_rows(layout: Callable[[Tensor], Tensor]) -> None:
    plan = routed(40, 5, 2)
    for function, t in ((moe_dispatch, drawn(40, 24)), (moe_combine, drawn(80, 24))):
        view = layout(t)
        assert torch.equal(function(view, plan), function(view.clone(memory_format=torch.contiguous_format), plan))


def test_under_vmap() -> None:
    """Maps of rows over one plan, and plans of their own; with gradients."""
    plan, x = routed(20, 5, 2), drawn(3, 20, 8)
    alone = torch.stack([through(rows, plan) for rows in x])
    assert torch.equal(torch.func.vmap(lambda rows: through(rows, plan))(x), alone)
    logits = drawn(3, 20, 5)

    def loss(rows: Tensor, scores: Tensor) -> Tensor:
        return through(rows, moe_route(scores, 2)).square().sum()

    for i, (of_map, each) in enumerate(
        zip((x, logits), torch.func.vmap(torch.func.grad(loss, (0, 1)))(x, logits), strict=True)
    ):
        wanted = torch.stack([torch.func.grad(loss, i)(a, b) for a, b in zip(x, logits, strict=True)])
        assert each.shape == of_map.shape
        assert relative_rms(each, wanted) < 1e-6


def test_rows_that_hold_nothing_are_not_read() -> None:
    plan = routed(40, 4, 2, capacity=5)
    y = drawn(80, 8)
    y[int(plan.offsets[-1]) :] = float("nan")
    assert moe_combine(y, plan).isfinite().all()
    assert not moe_dispatch(drawn(40, 8), plan)[int(plan.offsets[-1]) :].any()


@on_cpu
def test_derivatives_of_any_order_agree_with_differences() -> None:
    plan = routed(5, 3, 2, capacity=3, dtype=torch.float64)
    x, y, weights = (drawn(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, 4), (10, 4), (5, 2)))

    def dispatched(x: Tensor) -> Tensor:
        return moe_dispatch(x, plan)

    def combined(y: Tensor, weights: Tensor) -> Tensor:
        return moe_combine(y, plan._replace(weights=weights))

    def gradient(y: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        out = combined(y, weights).square().sum()
        return torch.autograd.grad(out, (y, weights), create_graph=True)

    for function, arguments in ((dispatched, (x,)), (combined, (y, weights))):
        assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(gradient, (y, weights))


# ---- torch's own rules


def test_opcheck_of_rows() -> None:
    plan = routed(5, 3, 2, capacity=3)
    x, y, weights = (drawn(*shape).requires_grad_() for shape in ((5, 4), (10, 4), (5, 2)))
    ops = torch.ops.madkernels
    torch.library.opcheck(ops.moe_dispatch.default, (x, None, plan.slots, plan.rows))
    torch.library.opcheck(ops.moe_dispatch.default, (x, weights, plan.slots, plan.rows))
    torch.library.opcheck(ops.moe_combine.default, (y, weights, plan.slots, plan.rows))
    torch.library.opcheck(ops.moe_combine.default, (y, None, plan.slots, plan.rows))
    torch.library.opcheck(ops.moe_dot.default, (x, y, plan.slots, plan.rows))


class Layer(torch.nn.Module):
    """As a model has it: every result of the plan is used, those that are properties where it is told so."""

    def __init__(self, properties: bool):
        super().__init__()
        self.properties = properties

    def forward(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        plan = moe_route(logits, 2, score="sigmoid", groups=(3, 2), capacity=9)
        out = moe_combine(moe_dispatch(x, plan) * 2, plan)
        more = plan.load_balance_loss + plan.dropped if self.properties else plan.mean_probs.square().sum()
        return out, more + plan.z_loss


@pytest.mark.parametrize(
    "properties",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.10."), reason="torch 2.10 compiles no property of a NamedTuple"
            ),
        ),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compile_and_export_of_a_layer(dtype: torch.dtype, properties: bool) -> None:
    torch.compiler.reset()
    layer = Layer(properties)
    inputs = tuple(drawn(40, n, dtype=dtype).requires_grad_() for n in (8, 12))
    plain = layer(*inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    grads = [torch.autograd.grad(out.square().sum() + loss, inputs) for out, loss in (plain, compiled)]
    for a, b in zip((*plain, *grads[0]), (*compiled, *grads[1]), strict=True):
        rounding = 8 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)
    with torch.no_grad():
        exported = torch.export.export(layer, inputs).module()(*inputs)
    assert torch.equal(exported[0], plain[0])


def test_a_plan_passes_through_torch_as_a_tree() -> None:
    leaves, tree = torch.utils._pytree.tree_flatten(routed(5, 3, 2))
    assert len(leaves) == len(RoutingPlan._fields)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, tree), RoutingPlan)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@on_cpu
@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "groups": (8, 4), "capacity": 900}], ids=str)
def test_same_bits_whatever_the_threads(options: dict[str, Any]) -> None:
    logits, x = drawn(5000, 64).requires_grad_(), drawn(5000, 100).requires_grad_()

    def bits(count: int) -> list[Tensor]:
        with threads(count):
            plan = moe_route(logits, 6, **options)
            out = through(x, plan)
            loss = out.square().sum() + plan.load_balance_loss + plan.z_loss
            return [*plan, out, *torch.autograd.grad(loss, (logits, x))]

    first, *others = [bits(count) for count in (1, 2, 3, 2)]
    assert all(torch.equal(a, b) for run in others for a, b in zip(first, run, strict=True))


# ---- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, RuntimeError, "moe_route: top_k is 0; expected 1 to 12"),
        ({"top_k": 13}, RuntimeError, "moe_route: top_k is 13; expected 1 to 12"),
        ({"top_k": 5, "groups": (3, 1)}, RuntimeError, "moe_route: top_k is 5; expected 1 to 4, the experts that a token"),
        ({"groups": (5, 1)}, RuntimeError, "moe_route: groups is 5; expected a divisor of the 12 experts"),
        ({"groups": (3, 4)}, RuntimeError, "moe_route: top_groups is 4; expected 1 to 3"),
        ({"groups": (3, 0)}, RuntimeError, "moe_route: top_groups is 0; expected 1 to 3"),
        ({"capacity": -1}, RuntimeError, "moe_route: capacity is -1; expected 0 at least, or None"),
        ({"bias": torch.zeros(11)}, RuntimeError, r"moe_route: bias has shape \(11,\); expected \(12,\)"),
        (
            {"bias": torch.zeros(12).half()},
            RuntimeError,
            "moe_route: bias has dtype float16; .* it takes float32",
        ),
        ({"score": "tanh"}, ValueError, "moe_route: score is 'tanh'; it takes 'softmax' or 'sigmoid'"),
        ({"jitter": -0.1}, ValueError, "moe_route: jitter is -0.1; expected 0"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    on_device = {k: v.to(backends.device()) if isinstance(v, Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        moe_route(drawn(5, 12), **{"top_k": 2, **on_device})


def test_refuses_rows_of_another_plan() -> None:
    plan = routed(5, 3, 2)
    with pytest.raises(RuntimeError, match=r"moe_dispatch: x has shape \(6, 4\); expected \(5, 4\)"):
        moe_dispatch(drawn(6, 4), plan)
    with pytest.raises(RuntimeError, match=r"moe_combine: y has shape \(5, 4\); expected \(10, 4\)"):
        moe_combine(drawn(5, 4), plan)
    with pytest.raises(RuntimeError, match="moe_combine: weights has dtype float64; with y in float32 it takes float32"):
        moe_combine(drawn(10, 4), plan._replace(weights=plan.weights.double()))


@pytest.mark.backends("ptx", "cuda")
def test_refuses_more_experts_than_a_gpu_takes() -> None:
    with pytest.raises(RuntimeError, match="moe_route: logits has 8193 experts; a GPU takes up to 8192"):
        moe_route(torch.zeros(1, 8193, device=backends.device()), 1)


# ---- wrong on purpose


def forgets_the_bias(logits: Tensor, top_k: int, bias: Tensor, **options: Any) -> RoutingPlan:
    return moe_route(logits, top_k, **options)


def weighs_with_the_bias(logits: Tensor, top_k: int, bias: Tensor, **options: Any) -> RoutingPlan:
    plan = moe_route(logits, top_k, bias=bias, **options)
    return plan._replace(weights=plan.weights + bias[plan.experts.long()])


def chooses_among_all_groups(logits: Tensor, top_k: int, groups: tuple[int, int], **options: Any) -> RoutingPlan:
    return moe_route(logits, top_k, **options)


def sums_all_of_a_group(logits: Tensor, top_k: int, groups: tuple[int, int], bias: Tensor, **options: Any) -> RoutingPlan:
    sums = (logits.sigmoid() + bias).view(len(logits), groups[0], -1).sum(-1)
    allowed = torch.zeros_like(sums).scatter(1, sums.topk(groups[1]).indices, 1).repeat_interleave(8 // groups[0], 1)
    return moe_route(logits.masked_fill(allowed == 0, -torch.inf), top_k, bias=bias, **options)


def keeps_the_last_tokens(logits: Tensor, top_k: int, **options: Any) -> RoutingPlan:
    plan = moe_route(logits.flip(0), top_k, **options)
    return plan._replace(experts=plan.experts.flip(0), rows=plan.rows.flip(0), weights=plan.weights.flip(0))


def takes_the_last_of_equals(logits: Tensor, top_k: int, bias: Tensor, **options: Any) -> RoutingPlan:
    plan = moe_route(logits.flip(1), top_k, bias=bias.flip(0), **options)
    return plan._replace(experts=logits.shape[1] - 1 - plan.experts)


@on_cpu
@pytest.mark.parametrize(
    "mutant",
    [
        forgets_the_bias, weighs_with_the_bias, chooses_among_all_groups, sums_all_of_a_group, keeps_the_last_tokens,
        takes_the_last_of_equals,
    ],
)  # fmt: skip
def test_mutants_are_caught(mutant: Callable[..., RoutingPlan]) -> None:
    logits, bias = drawn(70, 8).mul(4).round().div(4), torch.tensor([0.0, 0.25] * 4)
    options: dict[str, Any] = {"score": "sigmoid", "groups": (2, 1), "bias": bias, "capacity": 12}
    check_plan(logits, 2, **options)
    with pytest.raises(AssertionError):
        check_plan(logits, 2, mutant, **options)
