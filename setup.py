"""Builds madkernels._C with CMake. Metadata and settings are in pyproject.toml, the native build in CMakeLists.txt."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "madkernels" / "_version.py").read_text()).group(1)


def ninja() -> str:
    """Ninja, of the environment that runs this file before that of the shell."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("ninja", path=os.pathsep.join([beside, os.environ.get("PATH", "")])) or "ninja"


class CMakeBuild(build_ext):
    """Runs CMake in build/<interpreter>, which is kept, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        sanitize = os.environ.get("MADKERNELS_SANITIZE", "OFF")
        build = ROOT / "build" / (sys.implementation.cache_tag + ("-sanitize" if sanitize != "OFF" else ""))
        cmake = [sys.executable, "-m", "cmake"]
        configure = [
            *cmake,
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMADKERNELS_VERSION={VERSION}",
            f"-DMADKERNELS_SANITIZE={sanitize}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([*cmake, "--build", str(build)], check=True)
        subprocess.run([*cmake, "--install", str(build), "--prefix", str(destination)], check=True)


setup(ext_modules=[Extension("madkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
