"""The simulator's instructions one by one, on PTX written here: against NumPy, by what the PTX ISA says. No nvcc is needed.

That it finds what is wrong in kernels is tested by tests/simulator, and on the ops by test_gpu_kernels.py.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import backends
import numpy as np
import pytest
import torch

Case = tuple[str, list[str], Callable[..., Any]]  # type of the result, of the operands, what it is

DTYPES: dict[str, Any] = {
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (16, 32, 64)},
    **{f"{kind}{bits}": np.dtype(f"uint{bits}") for kind in "ub" for bits in (16, 32, 64)},
    "f32": np.dtype("float32"),
    "f64": np.dtype("float64"),
    "f16": np.dtype("uint16"),  # bits
    "bf16": np.dtype("uint16"),
}
LANES = 128
DIVIDES = {"div", "rem"}


def run(text: str, arrays: list[np.ndarray], blocks: int = 1, threads: int = LANES, shared: int = 0) -> str:
    """Runs the one kernel of some PTX on arrays -> what the simulator reports, or ""."""
    addresses = (ctypes.c_uint64 * len(arrays))(*(a.ctypes.data for a in arrays))
    sizes = (ctypes.c_uint64 * len(arrays))(*(a.nbytes for a in arrays))
    return backends.core().simulator_run(text.encode(), blocks, threads, shared, addresses, sizes).decode()


def kernel(body: str, parameters: int) -> str:
    """A kernel with the addresses of its parameters, moved on by 8 bytes a thread, in %rd0, %rd1, .."""
    given = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    registers = ".reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<20>; .reg .f32 %f<8>; .reg .b64 %rd<20>;"
    moves = "mov.u32 %r0, %tid.x; mul.wide.u32 %rd19, %r0, 8;"
    moves += "".join(f"ld.param.u64 %rd{i}, [p{i}]; add.s64 %rd{i}, %rd{i}, %rd19;" for i in range(parameters))
    head = ".version 9.0\n.target sm_80\n.address_size 64\n"
    return f"{head}.visible .entry k({given})\n{{\n{registers}\n{moves}\n{body}\nret;\n}}\n"


def values_of(type_: str, seed: int) -> np.ndarray:
    """Numbers of a type, one a lane: its ends, those around zero, and random ones."""
    generator = np.random.default_rng(seed)
    dtype = DTYPES[type_]
    if dtype.kind == "f":
        some = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3e38, -3e38, 1e-40, math.inf, -math.inf, math.nan, 1e10, -1e10]
        random = generator.standard_normal(LANES - len(some)) * 10.0 ** generator.integers(-6, 7, LANES - len(some))
    else:
        ends = np.iinfo(dtype)
        some = [0, 1, 2, 3, 31, 32, 33, 63, ends.max, ends.max - 1, ends.min, ends.min + 1]
        random = generator.integers(ends.min, ends.max, LANES - len(some), dtype=dtype, endpoint=True)
    values = np.concatenate([np.array(some, dtype), random.astype(dtype)])
    return values[generator.permutation(LANES)] if seed else values


def computed(name: str, result: str, operands: list[str], inputs: list[np.ndarray]) -> np.ndarray:
    """What the simulator makes of an instruction; predicates as 0 and 1."""
    arrays = [np.zeros(LANES, np.uint64)]
    lines = [f".reg .{'pred' if t == 'pred' else 'b' + str(8 * DTYPES[t].itemsize)} %x{i};" for i, t in enumerate(operands)]
    for i, (type_, values) in enumerate(zip(operands, inputs, strict=True)):
        wide = np.zeros(LANES, np.uint64)
        if type_ == "pred":
            wide[:] = values
            lines.append(f"ld.global.u32 %r{i + 1}, [%rd{i + 1}]; setp.ne.s32 %x{i}, %r{i + 1}, 0;")
        else:
            wide.view(values.dtype)[:: 8 // values.itemsize] = values
            lines.append(f"ld.global.b{8 * values.itemsize} %x{i}, [%rd{i + 1}];")
        arrays.append(wide)
    given = ", ".join(f"%x{i}" for i in range(len(operands)))
    if result == "pred":
        lines.append(f"{name} %p1, {given}; selp.u32 %r9, 1, 0, %p1; st.global.u32 [%rd0], %r9;")
    else:
        bits = 8 * DTYPES[result].itemsize
        lines.append(f".reg .b{bits} %y; {name} %y, {given}; st.global.b{bits} [%rd0], %y;")
    assert run(kernel("\n".join(lines), len(arrays)), arrays) == ""
    found = arrays[0]
    return found if result == "pred" else found.view(DTYPES[result])[:: 8 // DTYPES[result].itemsize]


# ---- what the ISA says of each ----


def shifted(a: np.ndarray, n: np.ndarray, left: bool) -> np.ndarray:
    bits = 8 * a.itemsize
    signed = a.dtype.kind == "i"
    some = np.minimum(n, bits - 1).astype(a.dtype)
    within = a << some if left else a >> some
    beyond = np.where(a < 0, -1, 0).astype(a.dtype) if signed and not left else np.zeros_like(a)
    return np.where(n < bits, within, beyond)


def inserted(a: np.ndarray, b: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The lowest bits of a in the place of some of b: first and length are bytes, and nothing goes beyond the last bit."""
    bits, found = 8 * a.itemsize, []
    for x, y, at, count in zip(a, b, first & 0xFF, length & 0xFF, strict=True):
        mask = ((1 << int(count)) - 1) << int(at) & ((1 << bits) - 1)
        found.append(int(y) & ~mask | int(x) << int(at) & mask)
    return np.array(found, object).astype(a.dtype)


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = [int(x) * int(y) >> (8 * a.itemsize) for x, y in zip(a, b, strict=True)]
    return np.array(products, object).astype(a.dtype)


def divided(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    quotients = [abs(int(x)) // abs(int(y)) * (-1 if (x < 0) != (y < 0) else 1) for x, y in zip(a, b, strict=True)]
    if remainder:
        quotients = [int(x) - q * int(y) for x, y, q in zip(a, b, quotients, strict=True)]
    return np.array([q & (2 ** (8 * a.itemsize) - 1) for q in quotients], object).astype(f"u{a.itemsize}").view(a.dtype)


def least(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    smaller = np.where((a < b) | ((a == b) & np.signbit(a)), a, b)
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, smaller))


def to_integer(type_: str, rounded: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    ends = np.iinfo(DTYPES[type_])

    def convert(a: np.ndarray) -> np.ndarray:
        clamped = [
            0 if math.isnan(x) else ends.max if x > ends.max else ends.min if x < ends.min else int(x)
            for x in map(float, rounded(a.astype(np.float64)))
        ]
        return np.array(clamped, object).astype(DTYPES[type_])

    return convert


def as_torch(dtype: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """Bits of a float rounded to a narrower type; NaN is 0x7fff."""

    def convert(a: np.ndarray) -> np.ndarray:
        bits = torch.from_numpy(a.copy()).to(dtype).view(torch.int16).numpy().view(np.uint16)
        return np.where(np.isnan(a), np.uint16(0x7FFF), bits)

    return convert


def directed(exact: Callable[..., Any], down: bool, *arrays: np.ndarray) -> np.ndarray:
    """The float32 next below what is exact, or next towards zero."""
    results = []
    for values in zip(*(a.tolist() for a in arrays), strict=True):
        if not all(map(math.isfinite, values)):
            results.append(np.float32(exact(*map(np.float64, values))))
            continue
        wanted = exact(*map(Fraction, values))
        near = nearest(wanted, np.float32) if wanted else np.float32(exact(*values))
        if Fraction(float(near)) > wanted if down else abs(Fraction(float(near))) > abs(wanted):
            near = np.nextafter(near, np.float32(-math.inf if down else 0))
        results.append(near)
    return np.array(results, np.float32)


def reversed_bits(a: np.ndarray) -> np.ndarray:
    return np.array([int(f"{int(x):032b}"[::-1], 2) for x in a], np.uint32)


def permuted_bytes(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    results = []
    for x, y, z in zip(a, b, c, strict=True):
        source = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        chosen = [int(z) >> 4 * i & 15 for i in range(4)]
        results.append(bytes((255 if source[n & 7] & 128 else 0) if n & 8 else source[n & 7] for n in chosen))
    return np.array([int.from_bytes(r, "little") for r in results], np.uint32)


def truth_table(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    r = np.zeros_like(a)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        r |= np.where(d >> np.uint32(i) & 1, term, 0).astype(a.dtype)
    return r


def funnel(a: np.ndarray, b: np.ndarray, c: np.ndarray, left: bool) -> np.ndarray:
    both, n = b.astype(np.uint64) << 32 | a, (c & 31).astype(np.uint64)
    return ((both << n) >> 32 if left else both >> n).astype(np.uint32)


def integer_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for bits, sign in itertools.product((16, 32, 64), "us"):
        t = f"{sign}{bits}"
        cases |= {
            f"add.{t}": (t, [t, t], np.add), f"sub.{t}": (t, [t, t], np.subtract),
            f"mul.lo.{t}": (t, [t, t], np.multiply), f"mul.hi.{t}": (t, [t, t], high),
            f"mad.lo.{t}": (t, [t, t, t], lambda a, b, c: a * b + c),
            f"min.{t}": (t, [t, t], np.minimum), f"max.{t}": (t, [t, t], np.maximum),
            f"div.{t}": (t, [t, t], lambda a, b: divided(a, b, False)),
            f"rem.{t}": (t, [t, t], lambda a, b: divided(a, b, True)),
            f"shr.{t}": (t, [t, "u32"], lambda a, n: shifted(a, n, False)),
        }  # fmt: skip
        if sign == "s":
            cases |= {f"neg.{t}": (t, [t], np.negative), f"abs.{t}": (t, [t], np.abs)}
        if bits < 64:
            w = f"{sign}{2 * bits}"
            cases[f"mul.wide.{t}"] = (w, [t, t], lambda a, b, w=w: a.astype(DTYPES[w]) * b.astype(DTYPES[w]))
            cases[f"mad.wide.{t}"] = (w, [t, t, w], lambda a, b, c, w=w: a.astype(DTYPES[w]) * b.astype(DTYPES[w]) + c)
        orders = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
        names = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}
        for name, compare in orders.items():
            cases[f"setp.{name}.{t}"] = cases[f"setp.{names[name]}.{t}"] = ("pred", [t, t], compare)
        cases |= {f"setp.eq.{t}": ("pred", [t, t], np.equal), f"setp.ne.{t}": ("pred", [t, t], np.not_equal)}
    return cases


def bit_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for bits in (16, 32, 64):
        t = f"b{bits}"
        cases |= {
            f"and.{t}": (t, [t, t], np.bitwise_and), f"or.{t}": (t, [t, t], np.bitwise_or),
            f"xor.{t}": (t, [t, t], np.bitwise_xor), f"not.{t}": (t, [t], np.invert),
            f"shl.{t}": (t, [t, "u32"], lambda a, n: shifted(a, n, True)),
            f"shr.{t}": (t, [t, "u32"], lambda a, n: shifted(a, n, False)),
            f"setp.eq.{t}": ("pred", [t, t], np.equal), f"setp.ne.{t}": ("pred", [t, t], np.not_equal),
        }  # fmt: skip
        for name in (t, f"u{bits}", f"s{bits}", *([f"f{bits}"] if bits > 16 else [])):
            cases[f"selp.{name}"] = (t, [t, t, "pred"], lambda a, b, p: np.where(p, a, b))
            cases[f"mov.{name}"] = (t, [t], np.copy)
    return cases | {
        "popc.b32": ("u32", ["b32"], lambda a: np.array([int(x).bit_count() for x in a])),
        "clz.b32": ("u32", ["b32"], lambda a: np.array([32 - int(x).bit_length() for x in a])),
        "brev.b32": ("b32", ["b32"], reversed_bits),
        "prmt.b32": ("b32", ["b32", "b32", "b32"], permuted_bytes),
        "bfi.b32": ("b32", ["b32", "b32", "u32", "u32"], inserted),
        "bfi.b64": ("b64", ["b64", "b64", "u32", "u32"], inserted),
        "lop3.b32": ("b32", ["b32", "b32", "b32", "u32"], truth_table),
        "shf.l.wrap.b32": ("b32", ["b32", "b32", "u32"], lambda a, b, c: funnel(a, b, c, True)),
        "shf.r.wrap.b32": ("b32", ["b32", "b32", "u32"], lambda a, b, c: funnel(a, b, c, False)),
        "mov.pred": ("pred", ["pred"], np.copy), "not.pred": ("pred", ["pred"], np.logical_not),
        "and.pred": ("pred", ["pred", "pred"], np.logical_and), "or.pred": ("pred", ["pred", "pred"], np.logical_or),
        "xor.pred": ("pred", ["pred", "pred"], np.logical_xor),
        "cvta.to.global.u64": ("u64", ["u64"], np.copy), "cvta.global.u64": ("u64", ["u64"], np.copy),
        "cvta.shared.u64": ("u64", ["u64"], lambda a: a + np.uint64(2**48)),
        "cvta.to.shared.u64": ("u64", ["u64"], lambda a: a - np.uint64(2**48)),
    }  # fmt: skip


def float_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for t in ("f32", "f64"):
        for rn in ("", "rn."):
            cases |= {
                f"add.{rn}{t}": (t, [t, t], np.add), f"sub.{rn}{t}": (t, [t, t], np.subtract),
                f"mul.{rn}{t}": (t, [t, t], np.multiply),
            }  # fmt: skip
        cases |= {
            f"div.rn.{t}": (t, [t, t], np.divide), f"rcp.rn.{t}": (t, [t], lambda a: 1 / a),
            f"copysign.{t}": (t, [t, t], lambda a, b: np.copysign(b, a)),
            f"sqrt.rn.{t}": (t, [t], np.sqrt), f"neg.{t}": (t, [t], np.negative), f"abs.{t}": (t, [t], np.abs),
            f"min.{t}": (t, [t, t], least), f"max.{t}": (t, [t, t], lambda a, b: -least(-a, -b)),
            f"setp.eq.{t}": ("pred", [t, t], np.equal), f"setp.ne.{t}": ("pred", [t, t], lambda a, b: (a < b) | (a > b)),
            f"setp.lt.{t}": ("pred", [t, t], np.less), f"setp.le.{t}": ("pred", [t, t], np.less_equal),
            f"setp.gt.{t}": ("pred", [t, t], np.greater), f"setp.ge.{t}": ("pred", [t, t], np.greater_equal),
            f"setp.equ.{t}": ("pred", [t, t], lambda a, b: ~((a < b) | (a > b))),
            f"setp.neu.{t}": ("pred", [t, t], np.not_equal), f"setp.ltu.{t}": ("pred", [t, t], lambda a, b: ~(a >= b)),
            f"setp.leu.{t}": ("pred", [t, t], lambda a, b: ~(a > b)),
            f"setp.gtu.{t}": ("pred", [t, t], lambda a, b: ~(a <= b)),
            f"setp.geu.{t}": ("pred", [t, t], lambda a, b: ~(a < b)),
            f"setp.num.{t}": ("pred", [t, t], lambda a, b: ~(np.isnan(a) | np.isnan(b))),
            f"setp.nan.{t}": ("pred", [t, t], lambda a, b: np.isnan(a) | np.isnan(b)),
        }  # fmt: skip
        roundings = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        for i in ("s32", "u32", "s64", "u64"):
            cases[f"cvt.rn.{t}.{i}"] = (t, [i], lambda a, t=t: a.astype(DTYPES[t]))
            cases |= {f"cvt.{name}.{i}.{t}": (i, [t], to_integer(i, rounded)) for name, rounded in roundings.items()}
    cases |= {f"cvt.{name}.f32.f32": ("f32", ["f32"], rounded) for name, rounded in roundings.items()}
    return cases | {
        "fma.rn.f32": ("f32", ["f32"] * 3, lambda a, b, c: rounded_once(a, b, c, np.float32)),
        "fma.rn.f64": ("f64", ["f64"] * 3, lambda a, b, c: rounded_once(a, b, c, np.float64)),
        "fma.rm.f32": ("f32", ["f32"] * 3, lambda *x: directed(lambda a, b, c: a * b + c, True, *x)),
        "add.rz.f32": ("f32", ["f32"] * 2, lambda *x: directed(lambda a, b: a + b, False, *x)),
        "ex2.approx.f32": ("f32", ["f32"], np.exp2), "ex2.approx.ftz.f32": ("f32", ["f32"], flushed(np.exp2)),
        "rcp.approx.ftz.f32": ("f32", ["f32"], flushed(lambda a: 1 / a)),
        "lg2.approx.ftz.f32": ("f32", ["f32"], flushed(np.log2)),
        "rsqrt.approx.ftz.f32": ("f32", ["f32"], flushed(lambda a: 1 / np.sqrt(a))),
        "cvt.sat.f32.f32": ("f32", ["f32"], lambda a: np.abs(np.nan_to_num(np.clip(a, 0, 1), nan=0))),
        "cvt.f64.f32": ("f64", ["f32"], lambda a: a.astype(np.float64)),
        "cvt.rn.f32.f64": ("f32", ["f64"], lambda a: a.astype(np.float32)),
        "cvt.f32.f16": ("f32", ["f16"], lambda a: a.view(np.float16).astype(np.float32)),
        "cvt.f32.bf16": ("f32", ["bf16"], lambda a: (a.astype(np.uint32) << 16).view(np.float32)),
        "cvt.rn.f16.f32": ("f16", ["f32"], as_torch(torch.float16)),
        "cvt.rn.bf16.f32": ("bf16", ["f32"], as_torch(torch.bfloat16)),
        "cvt.rn.f16x2.f32": ("b32", ["f32", "f32"], lambda a, b: packed(a, b, torch.float16)),
        "cvt.rn.bf16x2.f32": ("b32", ["f32", "f32"], lambda a, b: packed(a, b, torch.bfloat16)),
        "cvt.s64.s32": ("s64", ["s32"], lambda a: a.astype(np.int64)),
        "cvt.u64.u32": ("u64", ["u32"], lambda a: a.astype(np.uint64)),
        "cvt.u32.u64": ("u32", ["u64"], lambda a: a.astype(np.uint32)),
    }  # fmt: skip


def rounded_once(a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: Any) -> np.ndarray:
    results = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z) if all(map(math.isfinite, (x, y, z))) else 0
        limit = 2 ** (128 if dtype is np.float32 else 1024)
        if exact == 0:
            results.append(np.float64(x) * y + z)
        else:
            results.append(math.copysign(math.inf, exact) if abs(exact) >= limit else nearest(exact, dtype))
    return np.array(results, dtype)


def nearest(exact: Fraction, dtype: Any) -> Any:
    """The finite number next to a fraction, the even one of two: what float() rounds first may be beside it."""
    guess = dtype(float(exact))
    around = [guess, np.nextafter(guess, dtype(math.inf)), np.nextafter(guess, dtype(-math.inf))]

    def distance(x: Any) -> tuple[Fraction, int]:
        return abs(Fraction(float(x)) - exact), int(np.array(x).view(f"u{np.dtype(dtype).itemsize}")) & 1

    return min((x for x in around if math.isfinite(x)), key=distance)


def packed(a: np.ndarray, b: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return as_torch(dtype)(a).astype(np.uint32) << 16 | as_torch(dtype)(b)


def flushed(function: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    def apply(a: np.ndarray) -> np.ndarray:
        small = np.finfo(np.float32).tiny
        a = np.where(np.abs(a) < small, np.copysign(np.float32(0), a), a)
        result = function(a)
        return np.where(np.abs(result) < small, np.copysign(np.float32(0), result), result)

    return apply


CASES = integer_cases() | bit_cases() | float_cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_instruction(name: str) -> None:
    result, operands, expected = CASES[name]
    inputs = [values_of("u32", i) & 1 if t == "pred" else values_of(t, i) for i, t in enumerate(operands)]
    if name.partition(".")[0] in DIVIDES:
        inputs[1][inputs[1] == 0] = 1
    found = computed(name, result, operands, inputs)
    wanted = np.asarray(expected(*inputs)).astype(found.dtype)
    if found.dtype.kind != "f":
        np.testing.assert_array_equal(found, wanted)
    elif "approx" in name:
        np.testing.assert_allclose(found, wanted, rtol=1.5e-7)
    else:
        np.testing.assert_array_equal(found, wanted)
        numbers = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(wanted[numbers]))


def test_every_instruction_is_tested() -> None:
    assert sorted(CASES) == sorted(backends.core().simulator_instructions().decode().split())


def test_an_exact_zero_rounded_down_is_negative() -> None:
    inputs = [np.full(LANES, x, np.float32) for x in (1, 1, -1)]
    assert np.signbit(computed("fma.rm.f32", "f32", ["f32"] * 3, inputs)).all()


def lanes_of(body: str, *inputs: np.ndarray, dtype: Any = np.uint32, threads: int = 32) -> np.ndarray:
    """What a kernel writes to [%rd0], one value a thread; inputs have one too, at [%rd1], .."""
    arrays = [np.zeros(threads, np.uint64)]
    for values in inputs:
        arrays.append(np.zeros(threads, np.uint64))
        arrays[-1].view(values.dtype)[:: 8 // values.itemsize] = values
    assert run(kernel(body, len(arrays)), arrays, threads=threads) == ""
    return arrays[0].view(dtype)[:: 8 // np.dtype(dtype).itemsize]


LANE = np.arange(32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("name", "b", "c", "expected"),
    [
        ("bfly", 5, 31, LANE ^ 5),
        ("idx", 7, 31, np.full(32, 7)),
        ("up", 3, 0, np.where(LANE < 3, LANE, LANE - 3)),
        ("down", 3, 31, np.where(LANE > 28, LANE, LANE + 3)),
        ("bfly", 1, 0x1C1F, LANE ^ 1),  # segments of 4 lanes
        ("idx", 1, 0x1C1F, LANE // 4 * 4 + 1),
        ("up", 1, 0x1C00, np.where(LANE % 4 == 0, LANE, LANE - 1)),
        ("down", 2, 0x1C1F, np.where(LANE % 4 > 1, LANE, LANE + 2)),
    ],
)
def test_shuffles(name: str, b: int, c: int, expected: np.ndarray) -> None:
    body = f"shfl.sync.{name}.b32 %r1|%p1, %r0, {b}, {c}, -1; st.global.u32 [%rd0], %r1;"
    np.testing.assert_array_equal(lanes_of(body), expected)
    in_range = lanes_of(body.replace("st.", "selp.u32 %r1, 1, 0, %p1; st."))
    np.testing.assert_array_equal(in_range, (expected != LANE) | np.isin(name, ["idx", "bfly"]))


@pytest.mark.parametrize(
    ("vote", "expected"), [("ballot.b32 %r1", 0x001FFFFF), ("any.pred %p2", 1), ("all.pred %p2", 0), ("uni.pred %p2", 0)]
)
def test_votes(vote: str, expected: int) -> None:
    kind, _, result = vote.partition(" ")
    chosen = "" if result == "%r1" else "selp.u32 %r1, 1, 0, %p2;"
    body = f"setp.le.u32 %p1, %r0, 20; vote.sync.{kind} {result}, %p1, -1; {chosen} st.global.u32 [%rd0], %r1;"
    assert (lanes_of(body) == expected).all()


def test_lanes_part_and_meet_again() -> None:
    """In loops of different length, then in a shuffle of all."""
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    $again:
    setp.ge.u32 %p1, %r2, %r0;
    @%p1 bra $behind;
    add.s32 %r1, %r1, %r2;
    add.s32 %r2, %r2, 1;
    bra.uni $again;
    $behind:
    shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
    st.global.u32 [%rd0], %r3;
    """
    np.testing.assert_array_equal(lanes_of(body), ((LANE ^ 1) * ((LANE ^ 1) - 1) // 2).astype(np.uint32))


def test_guards_leave_registers_alone() -> None:
    body = (
        "mov.u32 %r1, 7; setp.lt.u32 %p1, %r0, 4; @%p1 mov.u32 %r1, 8; @!%p1 add.s32 %r1, %r1, 2; st.global.u32 [%rd0], %r1;"
    )
    np.testing.assert_array_equal(lanes_of(body), np.where(LANE < 4, 8, 9))


def test_registers_that_nothing_set_are_nan() -> None:
    """Where some path sets them, on the others."""
    body = "setp.lt.u32 %p1, %r0, 4; @%p1 mov.f32 %f1, 0f3F800000; st.global.f32 [%rd0], %f1;"
    found = lanes_of(body, dtype=np.float32)
    assert (found[:4] == 1).all()
    assert np.isnan(found[4:]).all()


def test_scopes_of_inline_assembly() -> None:
    """Registers of an inner scope are others than those of the same name outside."""
    body = "mov.u32 %r1, 5; { .reg .u32 %r1, t; .reg .pred q; mov.u32 t, 3; setp.ne.u32 q, t, 0; @q mov.u32 %r1, t; } "
    assert (lanes_of(body + "st.global.u32 [%rd0], %r1;") == 5).all()


@pytest.mark.parametrize(
    ("name", "to", "value", "expected"),
    [
        ("cvt.s32.s8", "%r", 0x1FF, 0xFFFFFFFF), ("cvt.u32.u8", "%r", 0x1FF, 0xFF), ("cvt.s16.s8", "%h", 0x80, 0xFF80),
        ("cvt.u32.u16", "%r", 0x12345678, 0x5678), ("cvt.u16.u32", "%h", 0x12345678, 0x5678),
        ("cvt.s64.s16", "%rd1", 0x8000, 0xFFFF8000),
    ],
)  # fmt: skip
def test_integer_conversions(name: str, to: str, value: int, expected: int) -> None:
    """The source's register is 32 bits wide, and only the lower ones count."""
    result = to if to == "%rd1" else f"{to}5"
    store = {"%r": f"st.global.u32 [%rd0], {result};", "%h": f"cvt.u32.u16 %r9, {result}; st.global.u32 [%rd0], %r9;"}
    body = f"mov.u32 %r1, {value}; {name} {result}, %r1;" + store.get(
        to, f"cvt.u32.u64 %r9, {result}; st.global.u32 [%rd0], %r9;"
    )
    assert (lanes_of(body) == expected).all()


def test_packing() -> None:
    body = """
    mov.b32 {%h1, %h2}, %r0;
    mov.u16 %h2, 3;
    mov.b32 %r1, {%h2, %h1};
    mov.b64 %rd5, {%r1, %r0};
    mov.b64 {%r2, %r3}, %rd5;
    sub.s32 %r4, %r3, %r0;
    add.s32 %r4, %r4, %r2;
    mov.b64 %rd5, {%h1, %h2, %h1, %h2};
    shr.u64 %rd5, %rd5, 16;
    cvt.u32.u64 %r5, %rd5;
    add.s32 %r4, %r4, %r5;
    st.global.u32 [%rd0], %r4;
    """
    np.testing.assert_array_equal(lanes_of(body), (LANE << 16 | 3) + (LANE << 16 | 3))


def test_sizes_of_accesses() -> None:
    source = np.array([0x80818283848586F7] * 32, np.uint64)
    for access, expected in [
        ("ld.global.u8 %r1, [%rd1]", 0xF7), ("ld.global.s8 %r1, [%rd1]", 0xFFFFFFF7),
        ("ld.global.s16 %r1, [%rd1]", 0xFFFF86F7),
        ("ld.global.nc.v2.u16 {%h1, %h2}, [%rd1+4]; cvt.u32.u16 %r1, %h2", 0x8081),
        ("ld.global.v2.u32 {%r2, %r1}, [%rd1]", 0x80818283), ("ld.u32 %r1, [%rd1+4]", 0x80818283),
        ("ld.global.u32 %rd5, [%rd1]; cvt.u32.u64 %r1, %rd5", 0x848586F7),
    ]:  # fmt: skip
        assert (lanes_of(f"{access}; st.global.u32 [%rd0], %r1;", source) == expected).all(), access
    stored = lanes_of("mov.u32 %r1, 258; st.global.u8 [%rd0], %r1; st.global.u16 [%rd0+2], %r1;")
    assert (stored == 0x01020002).all()


def test_generic_addresses_of_shared_memory() -> None:
    body = """
    .shared .align 4 .b8 table[128];
    mov.u64 %rd5, table;
    cvta.shared.u64 %rd6, %rd5;
    mul.wide.u32 %rd7, %r0, 4;
    add.s64 %rd7, %rd6, %rd7;
    st.u32 [%rd7], %r0;
    bar.sync 0;
    xor.b32 %r1, %r0, 1;
    mul.lo.u32 %r1, %r1, 4;
    mov.u32 %r2, table;
    add.s32 %r2, %r2, %r1;
    ld.shared.u32 %r3, [%r2];
    st.global.u32 [%rd0], %r3;
    """
    np.testing.assert_array_equal(lanes_of(body), LANE ^ 1)


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("add.u32", "%r0", 100 + 496), ("add.f32", "0f3F800000", None), ("min.s32", "-3", 2**32 - 3),
        ("max.u32", "%r0", 100),
        ("and.b32", "36", 36), ("or.b32", "%r0", 127), ("xor.b32", "1", 100), ("exch.b32", "%r0", 31),
        ("cas.b32", "100, %r0", 0),
    ],
)  # fmt: skip
def test_atomics(name: str, operands: str, expected: int | None) -> None:
    """Lanes come one after the other, each given what it found."""
    start = 100 if expected is not None else int(np.float32(1.5).view(np.uint32))
    cell, found = np.full(1, start, np.uint64), np.zeros(32, np.uint64)
    body = f"ld.param.u64 %rd5, [p1]; atom.global.{name} %r1, [%rd5], {operands}; st.global.u32 [%rd0], %r1;"
    assert run(kernel(body, 2), [found, cell], threads=32) == ""
    assert found[0] == start
    if expected is None:
        assert cell.view(np.float32)[0] == 33.5
    else:
        assert cell[0] == expected


def test_copies_fill_with_zeros() -> None:
    body = """
    .shared .align 16 .b8 table[512];
    ld.param.u64 %rd5, [p1];
    mul.lo.u32 %r1, %r0, 16;
    mov.u32 %r2, table;
    add.s32 %r2, %r2, %r1;
    cp.async.cg.shared.global [%r2], [%rd5], 16, 8;
    cp.async.wait_all;
    ld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%r2];
    add.s32 %r3, %r3, %r4;
    add.s32 %r3, %r3, %r5;
    add.s32 %r3, %r3, %r6;
    st.global.u32 [%rd0], %r3;
    """
    found, memory = np.zeros(32, np.uint64), np.full(3, 0x0000000700000005, np.uint64)
    first = memory.ctypes.data % 16 // 8  # so that it is aligned to 16 bytes
    assert run(kernel(body, 2), [found, memory[first : first + 1]], threads=32) == ""
    assert (found == 12).all()


def test_places_in_the_source() -> None:
    """Of folders whose names end in a slash too; behind the kernel, as nvcc writes them. Comments are passed over."""
    body = ".loc 1 7 3 // a comment\n /* and\n another */ .loc\t1 8 5, function_name $L, inlined_at 2 30 1\n"
    text = kernel(body + "ld.global.u32 %r1, [%rd0+2];", 1)
    text += '\t.file\t1 "/some/folder//csrc/common/x.h"\n\t.file\t2 "/some/csrc/op/y.cu"\n'
    said = run(text, [np.zeros(64, np.uint64)], threads=64)
    assert "(csrc/common/x.h:8 in csrc/op/y.cu:30, ld.global.u32 of given.ptx:" in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frob.b32 %r1, %r0;", "the instruction frob.b32 is not simulated"),
        ("wgmma.fence.sync.aligned;", "the instruction wgmma.fence.sync.aligned is not simulated"),
        ("ld.volatile.global.u32 %r1, [%rd0];", "the modifier volatile"),
        ("bar.sync 1, 64;", "only barrier 0 of all threads"),
        ("mov.u32 %r1, %clock;", "the special register %clock is not simulated"),
        ("add.s32 %r1, %rd0, 1;", "the register %rd0 has another width"),
        ("mov.u32 %r1, 0; div.s32 %r1, %r0, %r1;", "thread 0: division by zero"),
        ("setp.ne.u32 %p1, %r0, 0; @%p1 bar.sync 0;", "1 threads of the block have ended and do not come to this barrier"),
    ],
)
def test_reports(body: str, message: str) -> None:
    assert message in run(kernel(body, 1), [np.zeros(64, np.uint64)], threads=64)
