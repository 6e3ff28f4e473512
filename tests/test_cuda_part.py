"""The CUDA part on machines without a GPU: that it links, when it is loaded, and what is said where it is not."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import names_on_gpus
from native import find_nvcc
from torch import Tensor

import madkernels
from madkernels import cuda, ops  # noqa: F401  (ops: registers the refusals)

ROOT = Path(__file__).parent.parent
BUILT = Path(madkernels.__file__).parent / f"_C_cuda{EXTENSION_SUFFIXES[0]}"
LOAD = """
import ctypes, os, sys, torch
import madkernels._C
ctypes.CDLL(sys.argv[1], ctypes.RTLD_LOCAL)  # as torch loads its own
sys.setdlopenflags(os.RTLD_NOW)
import madkernels._C_cuda as part
from madkernels import cuda, ops  # noqa: F401  (ops: registers the refusals)
print(*part.build_info().values(), cuda.ops_with_kernels())
"""


@pytest.fixture
def fresh() -> Iterator[None]:
    cuda.load.cache_clear()
    yield
    cuda.load.cache_clear()


def call(key: str, x: Tensor, weight: Tensor) -> Any:
    """causal_conv as the dispatcher calls it for tensors of another device."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return torch.ops.madkernels.causal_conv.default.redispatch(keys, x, weight, None, False, None, None)


@pytest.mark.skipif(not BUILT.exists(), reason="built without CUDA")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: the next test loads the part itself")
def test_links_against_a_torch_without_cuda(tmp_path: Path) -> None:
    """With a stand-in for the one library that only a torch with CUDA has, every symbol is found and the module loads."""
    source, library = tmp_path / "stream.c", tmp_path / "stream.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return device; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", library, source], check=True)
    found = subprocess.run([sys.executable, "-c", LOAD, library], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert madkernels.__version__ in found.stdout


@pytest.mark.skipif(not BUILT.exists(), reason="built without CUDA")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch has no CUDA")
def test_loads_beside_a_torch_with_cuda() -> None:
    """No GPU is needed for that."""
    part, why = cuda.load()
    assert part is not None, why
    assert part.build_info()["version"] == madkernels.__version__
    assert cuda.ops_with_kernels() == names_on_gpus()


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
def test_what_is_said_of_a_gpu_that_cannot_be_used(tmp_path: Path) -> None:
    """By the part's own code, linked with a CUDA runtime that answers as it is told."""
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-Icsrc", "-DMADKERNELS_CUDA", '-DMADKERNELS_CUDA_ARCHS="80,90a"']
    sources = ["tests/cuda_errors.cpp", "csrc/common/cuda_errors.cu", "csrc/common/launch.cu"]
    nvcc = str(find_nvcc())
    flags.append(f"-L{Path(nvcc).parent.parent / 'lib'}")  # where pip's nvcc itself does not look
    command = [nvcc, *flags, "-arch=sm_90", "-Xlinker", "--allow-multiple-definition", *sources]
    built = subprocess.run([*command, "-o", tmp_path / "errors"], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    found = subprocess.run([tmp_path / "errors"], capture_output=True, text=True, check=True)
    said = dict(line.split(": ", 1) for line in found.stdout.splitlines())
    earlier = "a CUDA call before madkernels' some_kernel failed: cudaErrorName: what CUDA says. CUDA tells of errors late"
    for case, beginning, end in [
        ("good", "", ""),
        ("old GPU", "GPU 1 (Some GPU, compute capability 7.5) is too old", "keep the tensors on the CPU"),
        (
            "not built for it",
            "GPU 1 (Some GPU, compute capability 9.5) cannot run madkernels' CUDA kernels",
            "with this GPU",
        ),
        ("PTX too new", "GPU 1 (Some GPU", "with MADKERNELS_CUDA=on on the machine with this GPU"),
        ("old driver", "GPU 1 cannot be used: cudaErrorName", "build madkernels with an older CUDA toolkit"),
        ("old GPU in use", "GPU 1 (Some GPU, compute capability 7.5) is too old", "keep the tensors on the CPU"),
        ("another GPU in use", "no error", ""),
        ("it is asked once", "no error", ""),
        ("before a launch", earlier, "to see which call it was"),
        ("late", earlier, "to see which call it was"),
        ("of the launch", "launching some_kernel failed: cudaErrorName: what CUDA says", ""),
        ("afterwards", "no error", ""),
        ("shared memory that there is", "no error", ""),
        ("shared memory that is allowed", str((99 << 10) - (1 << 10)), ""),  # always all, so that no launch lowers it
        (
            "shared memory that there is not",
            "some_kernel takes 102400 bytes of shared memory a block",
            "this GPU has 101376",
        ),
    ]:
        assert said[case].startswith(beginning), case
        assert said[case].endswith(end), case
    assert "the kernels were built for 80,90a" in said["not built for it"]
    assert "the driver is older than the nvcc of the build" in said["PTX too new"]
    assert len(said) == 15, "a device is left current that was not before"


@pytest.mark.skipif(bool(cuda.ops_with_kernels()), reason="CUDA kernels are here")
def test_cuda_tensors_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"causal_conv has no CUDA kernel here: .*built without CUDA.*On the CPU it runs"):
        call("CUDA", torch.randn(1, 4, 8), torch.randn(8, 3))
    monkeypatch.setattr(cuda, "load", lambda: (object(), ""))
    assert cuda.why_not("causal_conv").startswith("causal_conv has no CUDA kernel here: it has none yet.")


def test_every_op_answers_cuda_tensors() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("madkernels::")]
    assert len(names) >= 6
    keys = "CUDA", "CompositeExplicitAutograd"  # the second: written in Python, for any device
    assert all(any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys) for name in names)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("torch_cuda", "found", "error", "reason"),
    [
        (None, True, None, "this torch was built without CUDA"),
        ("13.0", False, None, "madkernels was built without CUDA"),
        ("13.0", True, ImportError("undefined symbol: planted"), "does not load: undefined symbol: planted"),
    ],
)
def test_why_the_part_is_not_loaded(
    torch_cuda: str | None, found: bool, error: Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        assert error is not None, "it must not be loaded"
        raise error

    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    monkeypatch.setattr(importlib, "import_module", fail)
    part, why = cuda.load()
    assert part is None
    assert reason in why


@pytest.mark.parametrize("odd", ["x", "weight"])
def test_tensors_on_different_devices_are_refused(odd: str) -> None:
    tensors = {"x": torch.randn(1, 4, 8), "weight": torch.randn(8, 3)}
    tensors[odd] = tensors[odd].to("meta")
    with pytest.raises(RuntimeError, match="causal_conv: weight is on another device than x"):
        call("CPU", **tensors)
