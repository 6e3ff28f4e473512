"""The native build, for tests and checks: nvcc, and targets of CMake in the build folder that setup.py uses too."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = os.environ.get("MADKERNELS_SANITIZE", "OFF")
BUILD = ROOT / "build" / (sys.implementation.cache_tag + ("" if SANITIZE == "OFF" else "-sanitize"))


def ops_on_gpus() -> list[str]:
    """The ops that have CUDA kernels among the sources."""
    return sorted({kernel.parent.name for kernel in (ROOT / "csrc").glob("*/*.cu")} - {"common"})


def find_nvcc() -> str | None:
    """nvcc of PATH, CUDA_HOME, /usr/local/cuda or the packages of this Python, as csrc/nvcc.cmake looks for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    if packages := importlib.util.find_spec("nvidia"):
        folders += [str(found) for place in packages.submodule_search_locations or [] for found in Path(place).glob("*/bin")]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def build(target: str, **settings: str) -> Path:
    """Builds a target -> the build folder. The folder's settings stay as they are, but for those given.

    Where that fails, a RuntimeError has what was said. One process builds at a time.
    """
    cmake = [sys.executable, "-m", "cmake"]
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    settings |= {
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja", path=beside) or "ninja",
        "Python_EXECUTABLE": sys.executable,
        "MADKERNELS_SANITIZE": SANITIZE,
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    with locked():
        said([*cmake, f"-S{ROOT}", f"-B{BUILD}", "-GNinja", *options])
        said([*cmake, "--build", str(BUILD), "--target", target])
    return BUILD


@contextmanager
def locked() -> Iterator[None]:
    """Holds the build folder."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def said(command: list[str]) -> str:
    """What a command says, stdout and stderr; a RuntimeError with it where the command fails."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # not for the compiler
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(run.stdout)
    return run.stdout
