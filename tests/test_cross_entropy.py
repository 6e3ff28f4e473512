"""linear_cross_entropy in plain torch, and its Triton kernel: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from checks import misaligned, relative_error, strided, transposed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from madkernels.fused import cross_entropy, linear_cross_entropy

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (1, 8, 2), (7, 3, 5), (64, 16, 50), (65, 17, 129), (33, 8, 1000)]  # tokens, dim, vocab
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def composition(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: int) -> Tensor:
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, **options)


def inputs(tokens: int, dim: int, vocab: int, dtype: torch.dtype, *, with_bias: bool = True) -> list[Tensor]:
    """x, weight, targets, of which about a quarter are ignored but never all, and bias."""
    targets = torch.where(torch.rand(tokens) < 0.25, -100, torch.randint(vocab, (tokens,)))
    targets[0] = vocab - 1
    tensors = [torch.randn(tokens, dim).to(dtype), torch.randn(vocab, dim).to(dtype), targets]
    return [*tensors, torch.randn(vocab).to(dtype)] if with_bias else tensors


def loss_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor], **options: int) -> list[Tensor]:
    """The gradients are those of twice the loss."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(2 * loss, [t for t in leaves if t.requires_grad])]


def check(tensors: list[Tensor], *, slack: float = 0, chunk_tokens: int = 16, **options: int) -> None:
    """No further from float64 than twice torch's composition in the same dtype."""
    exact = loss_and_gradients(composition, [t.double() if t.is_floating_point() else t for t in tensors], **options)
    plain = loss_and_gradients(composition, tensors, **options)
    found = loss_and_gradients(linear_cross_entropy, tensors, chunk_tokens=chunk_tokens, **options)
    for ours, theirs, wanted in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        rounding = 64 * torch.finfo(torch.promote_types(tensors[0].dtype, torch.float32)).eps
        assert relative_error(ours, wanted) <= 2 * relative_error(theirs, wanted) + rounding + slack


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The Triton kernel, which takes the place of plain torch on the CPU too."""
    pytest.importorskip("triton")
    from madkernels.fused import cross_entropy_kernel

    monkeypatch.setattr(cross_entropy, "_losses", cross_entropy_kernel.losses)
    return cross_entropy_kernel


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from madkernels.fused.cross_entropy_kernel import BLOCK, _row

scalars = {"targets": "*i64", "found": "*fp32", "vocab": "i32", "ignore_index": "i32"}
for capability in (80, 90):
    for dtype in ("fp32", "bf16", "fp16"):
        signature = {"logits": f"*{dtype}", "stride": "i64", **scalars, "DIFFERENTIATE": "constexpr", "BLOCK": "constexpr"}
        source = ASTSource(fn=_row, signature=signature, constexprs={"DIFFERENTIATE": True, "BLOCK": BLOCK})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        print(capability, dtype, len(compiled.asm["cubin"]))
"""


def test_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """In another process, since Triton's interpreter is chosen when the kernel is defined. No GPU is needed."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    sizes = [int(line.split()[2]) for line in run.stdout.splitlines()]
    assert len(sizes) == 6
    assert min(sizes) > 0


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_against_float64(size: tuple[int, int, int], dtype: torch.dtype, with_bias: bool) -> None:
    check(inputs(*size, dtype, with_bias=with_bias))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (3, 4, 4097)], ids=str)
def test_kernel_against_float64(size: tuple[int, int, int], dtype: torch.dtype, kernel: ModuleType) -> None:
    truncates = dtype == torch.bfloat16 and KERNEL_DEVICE == "cpu"  # what the interpreter does in place of rounding
    check([t.to(KERNEL_DEVICE) for t in inputs(*size, dtype)], slack=torch.finfo(dtype).eps if truncates else 0)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 65, 1000])
def test_chunks_of_any_size(chunk_tokens: int) -> None:
    check(inputs(65, 8, 11, torch.float32), chunk_tokens=chunk_tokens)


def test_another_ignore_index() -> None:
    tensors = inputs(20, 8, 11, torch.float32)
    tensors[2] = tensors[2].where(tensors[2] != -100, 3)
    check(tensors, ignore_index=3)


@pytest.mark.parametrize("layout", [transposed, strided, misaligned])
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    x, weight, targets, bias = inputs(20, 8, 11, torch.float32)
    check([layout(x), layout(weight), targets, bias])


def test_logits_far_from_zero(kernel: ModuleType) -> None:
    x, weight, targets, bias = (t.to(KERNEL_DEVICE) for t in inputs(20, 8, 11, torch.float32))
    check([1000 * x, weight, targets, bias])


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_token_is_scored(tokens: int) -> None:
    x, weight, _, bias = inputs(max(tokens, 1), 8, 11, torch.float32)
    found = loss_and_gradients(linear_cross_entropy, [x[:tokens], weight, torch.full((tokens,), -100), bias])
    assert all(not t.any() for t in found)


def test_masked_logits_and_nan(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 8)
    logits, targets = torch.randn(4, 20, device=KERNEL_DEVICE), torch.tensor([19, 10, 3, -100], device=KERNEL_DEVICE)
    logits[0, :10] = -torch.inf  # a whole block and a part of one
    logits[1, 10] = -torch.inf
    logits[2:, 5] = torch.nan
    theirs = logits.clone().requires_grad_()
    wanted = F.cross_entropy(theirs, targets, reduction="none")
    wanted.sum().backward()
    torch.testing.assert_close(kernel.losses(logits, targets, -100, True), wanted.detach(), equal_nan=True)
    torch.testing.assert_close(logits[:3], theirs.grad[:3], equal_nan=True)
    assert not logits[3].any()  # ignored; torch lets the NaN through


def test_kernel_leaves_logits_alone_without_gradients(kernel: ModuleType) -> None:
    logits = torch.randn(4, 20, device=KERNEL_DEVICE)
    before = logits.clone()
    kernel.losses(logits, torch.tensor([0, 1, -100, 19], device=KERNEL_DEVICE), -100, False)
    assert torch.equal(logits, before)


def test_kernel_takes_targets_of_any_stride(kernel: ModuleType) -> None:
    logits = torch.randn(4, 20, device=KERNEL_DEVICE)
    targets = torch.tensor([3, 0, 7, 0, 3, 0, 19, 0], device=KERNEL_DEVICE)[::2]
    for view in (targets, targets[:1].expand(4)):
        wanted = F.cross_entropy(logits, view, reduction="none")
        torch.testing.assert_close(kernel.losses(logits.clone(), view, -100, True), wanted)


def test_kernel_reads_nothing_at_targets_out_of_range(kernel: ModuleType) -> None:
    targets = torch.tensor([20, -1, 2**40], device=KERNEL_DEVICE)
    assert kernel.losses(torch.randn(3, 20, device=KERNEL_DEVICE), targets, -100, True).isnan().all()


# ---- as part of torch


def test_autocast() -> None:
    tensors = inputs(20, 8, 11, torch.float32)
    exact = loss_and_gradients(composition, [t.double() if t.is_floating_point() else t for t in tensors])
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss_and_gradients(composition, tensors)
        found = loss_and_gradients(linear_cross_entropy, tensors, chunk_tokens=8)
    for ours, theirs, wanted in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert relative_error(ours, wanted) <= 2 * relative_error(theirs, wanted)
    assert relative_error(found[0], exact[0]) > 1e-5  # it did compute in bfloat16


def test_parts_of_a_weights_gradient_are_summed_in_float32() -> None:
    """Of 512 chunks alike, in bfloat16 the sum would stop growing at 256 times a part."""
    x, weight, targets = torch.ones(512, 1).bfloat16(), torch.zeros(2, 1).bfloat16(), torch.zeros(512).long()
    _, _, dweight = loss_and_gradients(linear_cross_entropy, [x, weight, targets], chunk_tokens=1)
    assert dweight.flatten().tolist() == [-1.0, 1.0]  # twice, of half each


def test_float16_gradients_do_not_vanish() -> None:
    """Nor does one over 100,000 tokens, with the loss scaled as float16 is trained."""
    x, weight, targets = inputs(100_000, 2, 3, torch.float16, with_bias=False)
    leaf = x.requires_grad_()
    (2.0**16 * linear_cross_entropy(leaf, weight, targets)).backward()
    exact = loss_and_gradients(composition, [x.double(), weight.double(), targets])[1] * 2.0**15
    assert relative_error(leaf.grad, exact) < 2e-3


def test_runs_repeat_bit_for_bit() -> None:
    tensors = inputs(65, 17, 129, torch.float32)
    runs = [loss_and_gradients(linear_cross_entropy, tensors, chunk_tokens=16) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_without_gradients() -> None:
    x, weight, targets, bias = inputs(20, 8, 11, torch.float32)
    weight.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, composition(x, weight, targets, bias).detach())


def test_backward_twice_gives_the_same() -> None:
    x, weight, targets, _ = inputs(20, 8, 11, torch.float32)
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_compile_as_one_graph() -> None:
    tensors = inputs(20, 8, 11, torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found = loss_and_gradients(compiled, tensors, chunk_tokens=8)
    wanted = loss_and_gradients(linear_cross_entropy, tensors, chunk_tokens=8)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("differentiate", [True, False])
def test_opcheck(differentiate: bool) -> None:
    x, weight, targets, bias = inputs(20, 8, 11, torch.bfloat16)
    arguments = (x, weight, targets, bias, -100, 8, differentiate)
    op = torch.ops.madkernels.linear_cross_entropy.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_second_derivative() -> None:
    x, weight, targets, _ = inputs(20, 8, 11, torch.float32)
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def largest_allocation(function: Callable[..., Tensor], tensors: list[Tensor], **options: int) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_and_gradients(function, tensors, **options)
    return max(event.self_cpu_memory_usage for event in profiler.events())


def test_all_logits_are_never_held() -> None:
    tensors = inputs(1024, 8, 1000, torch.float32)
    logits = 1024 * 1000 * 4
    assert largest_allocation(composition, tensors) >= logits
    assert largest_allocation(linear_cross_entropy, tensors, chunk_tokens=32) <= logits // 32


# ---- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(2, 10, 8)}, "x has shape (2, 10, 8); expected (tokens, dim)"),
        ({"x": torch.ones(20, 8, dtype=torch.int64)}, "x has dtype torch.int64; expected a float dtype"),
        ({"weight": torch.randn(11, 9)}, "weight has shape (11, 9); expected (vocab, 8)"),
        (
            {"targets": torch.zeros(19, dtype=torch.int64)},
            "targets has dtype torch.int64 and shape (19,); expected int64 (20,)",
        ),
        ({"targets": torch.zeros(20)}, "targets has dtype torch.float32 and shape (20,); expected int64 (20,)"),
        ({"targets": torch.full((20,), 11)}, "targets holds 11; expected 0 to 10, or -100 to ignore a token"),
        ({"targets": torch.full((20,), -1)}, "targets holds -1; expected 0 to 10"),
        ({"bias": torch.randn(1)}, "bias has shape (1,); expected (11,)"),
        ({"bias": torch.randn(11, device="meta")}, "x, weight, targets and bias are on different devices"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; expected a whole number from 1"),
    ],
)
def test_refusals(changed: dict[str, Tensor | int], message: str) -> None:
    x, weight, targets, bias = inputs(20, 8, 11, torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(**{"x": x, "weight": weight, "targets": targets, "bias": bias} | changed)
