"""`madkernels doctor`: what it says, also where things are missing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import madkernels
from madkernels import _C, cuda
from madkernels.cli import doctor as module

app = typer.Typer()
app.command()(module.doctor)


def run() -> str:
    result = CliRunner().invoke(app, [], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def extension(**changes: Any) -> Any:
    """A stand-in for the extension."""
    info = {"version": madkernels.__version__, "compiler": "GNU 12", "torch_target": "2.10"}
    info |= {"isas": "baseline,avx2,avx512"} | changes.pop("info", {})
    facts = {"cpu_isa": "avx2", "cpu_supported": ["baseline", "avx2"], "cpu_bfloat16_dot": True} | changes
    return SimpleNamespace(build_info=lambda: info, **{name: lambda v=v: v for name, v in facts.items()})


def cuda_part(problem: str = "", version: str = madkernels.__version__) -> Any:
    """A stand-in for the CUDA part."""
    info = {"version": version, "nvcc": "13.0.88", "archs": "80,90a", "ptx": "90"}
    return SimpleNamespace(build_info=lambda: info, device_problem=lambda device: problem)


def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("undefined symbol: aoti_torch_new")

    monkeypatch.setattr(importlib, "import_module", fail)


def gpu(monkeypatch: pytest.MonkeyPatch, part: Any = None, failure: str = "") -> None:
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(module, "nvidia_driver", lambda: "580.1")
    monkeypatch.setattr(cuda, "load", lambda: (part, failure))


def test_says_what_is_here() -> None:
    text = run()
    assert f"madkernels    {madkernels.__version__}" in text
    assert torch.__version__ in text
    assert _C.build_info()["compiler"] in text
    assert f"{_C.cpu_isa()}{' with products of bfloat16' if _C.cpu_bfloat16_dot() else ''} in use" in text
    for op in ("selective_scan", "causal_conv"):
        row = next(line for line in text.splitlines() if op in line)
        on_cuda = "yes" if op in cuda.ops_with_kernels() else "not built"
        assert [cell.strip() for cell in row.split("│")[1:4]] == [op, "yes", on_cuda]


def test_says_why_there_are_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no GPU that would miss them."""
    monkeypatch.setattr(cuda, "load", lambda: (None, "it does not load: undefined symbol: planted"))
    assert "none: it does not load: undefined symbol: planted" in " ".join(run().split())


def test_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    without_extension(monkeypatch)
    text = run()
    assert "undefined symbol: aoti_torch_new" in text
    assert "pip install --no-build-isolation ." in text
    assert "in use" not in text


def test_ops_without_a_kernel() -> None:
    assert module.has_cpu_kernel("selective_scan")
    assert not module.has_cpu_kernel("no_such_op")


def test_all_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_extension", lambda: (extension(), ""))
    monkeypatch.setattr(module, "nvidia_driver", lambda: None)
    assert "Nothing that this machine could use is missing." in run()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"info": {"isas": "baseline,avx2"}}, "Built without avx512:"),
        ({"cpu_isa": "baseline"}, "baseline is in use though this CPU has avx2: unset MADKERNELS_CPU."),
        ({"info": {"version": "0.0.1"}}, "The extension is of version 0.0.1"),
    ],
)
def test_advice(changes: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "nvidia_driver", lambda: None)
    (found,) = module.advice(extension(**changes), "")
    assert found.startswith(line)


def test_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, None, "madkernels was built without CUDA: rebuild it")
    text = run()
    assert "NVIDIA H100, compute capability 9.0, 80 GiB" in text
    assert "580.1" in text
    assert "There is a GPU, but madkernels was built without CUDA: rebuild it." in text


def test_gpu_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, cuda_part())
    assert "built for 80, 90a, PTX 90, with nvcc 13.0.88" in run()
    assert module.gpu_advice() == []


def test_gpu_that_the_kernels_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, cuda_part("GPU 0 (Tesla T4, compute capability 7.5) is too old", "0.0.1"))
    problem, version = module.gpu_advice()
    assert problem.startswith("GPU 0 (Tesla T4, compute capability 7.5) is too old")
    assert version.startswith("The CUDA part is of another version")


@pytest.mark.parametrize(
    ("torch_cuda", "line"),
    [
        (None, "There is an NVIDIA GPU, but this torch was built without CUDA"),
        ("13.0", "There is an NVIDIA driver, but torch cannot use a GPU: The NVIDIA driver on your system is too old"),
    ],
)
def test_gpu_that_torch_cannot_use(torch_cuda: str | None, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch, "zeros", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "nvidia_driver", lambda: "580.1")
    (found,) = module.advice(extension(), "")
    assert found.startswith(line)


def test_command_runs_where_the_extension_does_not_load(tmp_path: Path) -> None:
    """In another process, where importing the extension fails."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'madkernels._C':\n"
        "            raise ImportError('undefined symbol: planted')\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "madkernels.cli", "doctor"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "undefined symbol: planted" in run.stdout
    assert "pip install --no-build-isolation ." in run.stdout


def test_lists_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXTRAS", ("pytest", "no-such-package"))
    assert f"pytest {pytest.__version__}, no-such-package not installed" in run()
