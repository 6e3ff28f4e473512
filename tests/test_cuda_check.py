"""How nvcc is run, how `make cuda-check` reads ptxas, and tools/cuda_blocks.py a disassembly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuda_blocks
import cuda_check
import pytest
from cuda_check import Compiled, Kernel, as_markdown, as_text, parse, problems, rows, short_name
from native import ROOT, find_nvcc

LOG = """\
ptxas info    : 24 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '_Z4plainPf' for 'sm_80'
ptxas info    : Function properties for _Z4plainPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 27 registers, used 1 barriers, 4096 bytes smem, 392 bytes cmem[0]
ptxas info    : Compile time = 30.699 ms
ptxas warning : something that no version has said so far
ptxas info    : Compiling entry function '_Z5heavyPf' for 'sm_90a'
ptxas info    : Function properties for _Z6calledPf
    16 bytes stack frame, 999 bytes spill stores, 999 bytes spill loads
ptxas info    : Function properties for _Z5heavyPf
    64 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 64 bytes cumulative stack size, 392 bytes cmem[0]
"""


def compiled(kernels: list[Kernel]) -> Compiled:
    return Compiled(Path("csrc/common/some.cu"), kernels)


def nvcc_once(nvcc: str, source: Path) -> subprocess.CompletedProcess[str]:
    """Compiles a file as the build does, for sm_80: x.o and the rest beside it."""
    command = [sys.executable, str(ROOT / "csrc" / "nvcc_once.py"), str(source.with_suffix(".o")), "80"]
    command += [nvcc, "-gencode", "arch=compute_80,code=sm_80", "-Xptxas=-v", "-c", str(source)]
    return subprocess.run(command, capture_output=True, text=True, cwd=source.parent)


def test_parses_what_ptxas_says() -> None:
    assert parse(LOG) == [
        Kernel("_Z4plainPf", "80", 27, 0, 0, 0, 4096),
        Kernel("_Z5heavyPf", "90a", 255, 12, 20, 64, 0),
    ]
    assert parse("ptxas info    : 0 bytes gmem\n") == []


def test_a_kernel_without_registers_is_an_error() -> None:
    with pytest.raises(ValueError, match="not understood"):
        parse("ptxas info : Compiling entry function '_Z1aPf' for 'sm_80'\n")


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("madkernels::(anonymous namespace)::sum_parts_kernel(float const*, long, long)", "sum_parts_kernel"),
        ("void madkernels::gpu::scan<float, (int)16, (bool)1>(madkernels::Params)", "scan<float, 16, 1>"),
        ("void scan<madkernels::BFloat16>(float (*)(int))", "scan<BFloat16>"),
        ("_Z4plain", "_Z4plain"),
    ],
)
def test_short_names(full: str, short: str) -> None:
    assert short_name(full) == short


def test_spills_fail_unless_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = compiled([Kernel("scan<float>", "80", 255, 4, 4, 8, 0), Kernel("conv", "80", 20, 0, 0, 8, 0)])
    assert problems([spilling]) == ["scan<float> spills on sm_80"]
    monkeypatch.setattr(cuda_check, "ALLOWED_SPILLS", {"scan": "a reason"})
    assert problems([spilling]) == []
    assert "- `scan`: a reason" in as_markdown(list(rows([spilling])), "13.0")


def test_tables() -> None:
    table = list(rows([compiled([Kernel("a<float>", "80", 27, 0, 0, 0, 4096), Kernel("b", "80", 8, 0, 0, 0, 0)])]))
    first = as_text(table).splitlines()[1]
    assert first.split() == ["common/some.cu", "a<float>", "sm_80", "27", "0", "0", "4096", "0"]
    assert "| common/some.cu | `b` | sm_80 | 8 | 0 | 0 | 0 | 0 |" in as_markdown(table, "13.0")


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("declared", ["__device__", "__host__ __device__"])
def test_host_calls_of_device_functions_fail(declared: str, tmp_path: Path) -> None:
    """nvcc itself says nothing where the caller is a template."""
    source = tmp_path / "x.cu"
    source.write_text(
        f"{declared} inline bool odd(int x) {{ return x % 2; }}\n"
        "template <class T> bool odd_of(T x) { return odd(x); }\n"
        "int main(int count, char**) { return odd_of(count); }\n"
        "__global__ void store(int* x) { *x = odd(*x); }\n"
    )
    run = nvcc_once(str(find_nvcc()), source)
    if declared == "__device__":
        assert run.returncode == 1
        assert "x.cu: a host function calls one that is __device__ only" in run.stdout
        assert not (tmp_path / "x.o").exists(), "the next build would take it"
    else:
        assert (run.returncode, run.stdout) == (0, "")
        assert {path.name for path in tmp_path.iterdir()} == {"x.cu", "x.o", "x.80.ptx", "x.80.cubin", "x.log"}
        assert ".target sm_80" in (tmp_path / "x.80.ptx").read_text()
        assert [kernel.name for kernel in parse((tmp_path / "x.log").read_text())] == ["_Z5storePi"]


@pytest.mark.parametrize("code", [0, 1])
def test_what_nvcc_says_is_shown(code: int, tmp_path: Path) -> None:
    """All of it where it fails, else what is no report of ptxas."""
    report, other = "ptxas info    : 0 bytes gmem\n", "  no such thing\n"
    nvcc = tmp_path / "nvcc"
    made = 'cc -c -x c /dev/null -o "$7" && touch "${10}/x.ptx" "${10}/x.sm_80.cubin"'  # $7: behind -o; $10: --keep-dir
    nvcc.write_text(f"#!/bin/sh\n{made}\nprintf '{report}{other}' >&2\nexit {code}\n")
    nvcc.chmod(0o755)
    run = nvcc_once(str(nvcc), tmp_path / "x.cu")
    assert (run.returncode, run.stdout) == (code, report + other if code else other), run.stderr
    assert (tmp_path / "x.log").read_text() == report + other


def test_says_where_nvcc_was_looked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda_check, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cuda_check.py"])
    assert cuda_check.main() == 2
    assert "no nvcc on PATH" in capsys.readouterr().err


LISTING = """\
\t.headerflags\t@"EF_CUDA_TEXTURE_MODE_UNIFIED"
.text._Z5otherv:
        /*0000*/                   EXIT ;
.text._Z4scanPf:
.L_x_7:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 IMAD.MOV.U32 R2, RZ, RZ, R3 ;
        /*0020*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0030*/               @P0 BRA `(.L_x_9) ;
.L_x_8:
        /*0040*/                   FFMA R4, R5, R6, R4 ;
        /*0050*/                   FFMA.FTZ R4, R5, R6, R4 ;
.L_x_9:
        /*0060*/                   EXIT ;
"""


def test_blocks_of_a_kernel() -> None:
    found = dict(cuda_blocks.functions(LISTING))
    assert list(found) == ["_Z5otherv", "_Z4scanPf"]
    first, second, last = cuda_blocks.blocks(found["_Z4scanPf"])
    assert (first.first, len(first.instructions), first.branch) == (0, 4, "@P0 BRA `(.L_x_9)")
    assert first.mnemonics == {"LDC": 1, "IMAD": 1, "ISETP": 1, "BRA": 1}
    assert (second.first, second.mnemonics, second.branch) == (4, {"FFMA": 2}, "")
    assert cuda_blocks.as_line(last) == "     6     1  EXIT:1  EXIT"
