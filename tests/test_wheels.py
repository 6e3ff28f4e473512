"""What packages promise: the same bytes from the same sources, and versions that agree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import madkernels

if sys.version_info < (3, 11):
    pytest.skip("tools/wheels.py needs tomllib, which Python 3.10 has not", allow_module_level=True)
import wheels

CODE = "madkernels/__init__.py", "madkernels/_version.py"
PACKED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", *CODE)
DATE = 1700000000


def packed(folder: Path, umask: int) -> Path:
    """The source distribution of a few of the files, copied now."""
    for name in PACKED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheels.ROOT / name, folder / name)
        (folder / name).chmod(0o666 & ~umask)
        os.utime(folder / name, (umask, umask))
    command = [sys.executable, "setup.py", "--quiet", "sdist"]
    dated = os.environ | {"SOURCE_DATE_EPOCH": str(DATE)}
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=dated)
    [made] = (folder / "dist").iterdir()
    return made


def test_the_source_distribution_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = packed(tmp_path / "first", 0o022), packed(tmp_path / "second", 0o077)
    assert first.read_bytes() == second.read_bytes()
    assert int.from_bytes(first.read_bytes()[4:8], "little") == DATE  # of the gzip file itself
    with tarfile.open(first) as archive:
        top = first.name.removesuffix(".tar.gz")
        assert {f"{top}/{name}" for name in (*PACKED, "PKG-INFO")} <= set(archive.getnames())
        assert {member.mtime for member in archive} == {DATE}


def test_the_versions_agree() -> None:
    """But for the changelog, which names a version when it is released."""
    wrong = wheels.wrong_with(f"v{madkernels.__version__}")
    assert [line for line in wrong if "CHANGELOG.md" not in line] == []


def test_a_tag_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "madkernels").mkdir()
    (tmp_path / "madkernels/_version.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3] - 2026-01-02\n\n## [1.2] - 2026-01-01\n")
    assert wheels.wrong_with("v1.2.3", tmp_path) == []
    assert [line.split()[1] for line in wheels.wrong_with("v1.2", tmp_path)] == ["madkernels/_version.py", "CITATION.cff"]
    assert len(wheels.wrong_with("v1.2.30", tmp_path)) == 3


def test_the_readme_has_the_nvcc_of_the_extra() -> None:
    [nvcc] = wheels.SETTINGS["project"]["optional-dependencies"]["cuda-build"]
    assert f"pip install '{nvcc}'" in (wheels.ROOT / "README.md").read_text()
