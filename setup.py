"""Builds madkernels._C and _C_cuda with CMake. Settings are in pyproject.toml, the native build in CMakeLists.txt.

Environment variables: MADKERNELS_CUDA=auto|on|off (auto: where nvcc is found and torch has CUDA),
MADKERNELS_CUDA_ARCHS="80;90a" (if absent: those of the GPUs here, else these two), MADKERNELS_SANITIZE=ON.
"""

import gzip
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "madkernels" / "_version.py").read_text()).group(1)


def ninja() -> str:
    """Ninja, of the environment that runs this file before that of the shell."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("ninja", path=os.pathsep.join([beside, os.environ.get("PATH", "")])) or "ninja"


def gpu_archs() -> str:
    """The architectures of this machine's GPUs that kernels are written for; both kinds if it has none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        capabilities = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        capabilities = torch_capabilities()
    found = {c.replace(".", "") for c in capabilities if re.fullmatch(r"\d+\.\d", c) and float(c) >= 8}
    return ";".join(sorted(("90a" if c == "90" else c for c in found), key=lambda c: (len(c.rstrip("a")), c))) or "80;90a"


def check_torch() -> None:
    """Ends in a sentence where the build would not find the torch that is to run it, as in an isolated build."""
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "madkernels: torch is not importable here. Install torch first, then madkernels beside it, without isolation:\n"
            "    pip install torch 'setuptools>=77' 'cmake>=3.26' ninja 'pybind11>=2.13'\n"
            "    pip install --no-build-isolation ."
        )


def torch_capabilities() -> list[str]:
    """The compute capabilities of the GPUs that torch sees."""
    import torch

    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return ["{}.{}".format(*torch.cuda.get_device_capability(device)) for device in devices]


class CMakeBuild(build_ext):
    """Runs CMake in build/<interpreter>, which is kept, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        if ext.optional:  # _C_cuda, which is built with _C
            return
        check_torch()
        destination = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        sanitize = os.environ.get("MADKERNELS_SANITIZE", "OFF")
        build = ROOT / "build" / (sys.implementation.cache_tag + ("-sanitize" if sanitize != "OFF" else ""))
        cmake = [sys.executable, "-m", "cmake"]
        cuda = os.environ.get("MADKERNELS_CUDA", "auto")
        archs = os.environ.get("MADKERNELS_CUDA_ARCHS") or (gpu_archs() if cuda != "off" else "80;90a")
        configure = [
            *cmake,
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMADKERNELS_VERSION={VERSION}",
            f"-DMADKERNELS_SANITIZE={sanitize}",
            f"-DMADKERNELS_CUDA={cuda}",
            f"-DMADKERNELS_CUDA_ARCHS={archs}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([*cmake, "--build", str(build)], check=True)
        for folder in (destination, *([ROOT / "madkernels"] if self.editable_mode else [])):
            for stale in folder.glob("_C_cuda*.so"):  # of a build with CUDA, where this one may have none
                stale.unlink()
        subprocess.run([*cmake, "--install", str(build), "--prefix", str(destination)], check=True)


class DatedSdist(sdist):
    """Packs the source distribution with times of SOURCE_DATE_EPOCH, if set: the same sources give the same bytes."""

    def make_archive(self, base_name: str, format: str, root_dir: Any = None, base_dir: Any = None, **owner: Any) -> str:
        date = os.environ.get("SOURCE_DATE_EPOCH")
        if date is None:
            return super().make_archive(base_name, format, root_dir, base_dir, **owner)
        packed = f"{base_name}.tar.gz"
        self.mkpath(os.path.dirname(packed))
        with (
            gzip.GzipFile(packed, "wb", mtime=int(date)) as file,
            tarfile.open(fileobj=file, mode="w", dereference=True) as tar,
        ):
            for path in sorted(Path(base_dir).rglob("*")):
                if path.is_file():
                    tar.add(path, filter=lambda member: nobody_s(member, int(date)))
        return packed


def nobody_s(member: tarfile.TarInfo, date: int) -> tarfile.TarInfo:
    """A file of an archive without what tells who packed it, and when."""
    member.mtime, member.uid, member.gid, member.uname, member.gname = date, 0, 0, "", ""
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member


MODULES = [Extension("madkernels._C", sources=[]), Extension("madkernels._C_cuda", sources=[], optional=True)]
setup(ext_modules=MODULES, cmdclass={"build_ext": CMakeBuild, "sdist": DatedSdist})
